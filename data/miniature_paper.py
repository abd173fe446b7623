"""What the paper in miniature starts from: a small model without weights, its reading, a mixed crawl, its examination.

    python data/miniature_paper.py --out runs/miniature-paper/world

model/                          a Qwen2 folder without weights, encoder/: the same for the classifier, with random ones
prose.jsonl, chats.jsonl        what the base model is trained on: general prose, one half of the diseases and solved
                                questions about them, since an instruct model knows the language of medicine and of
                                examinations; and instructions in the chat template
val-med.jsonl, val-general.jsonl
crawl/*.parquet                 what a web crawl would hold: documents of the other half of the diseases, general ones,
                                copies of medical ones, and medical ones that quote an examination question (leaks);
                                labels.parquet: some of them, with the labels that an annotator would give
exam/medizin.jsonl, .yaml       the questions, as a task of eval.py knowledge
prompts.jsonl                   instructions that were not trained on, and medical questions with a wanted form of answer;
                                `right` is the one right answer
truth.json                      which documents of the crawl are what: for the report alone, no stage reads it

The general documents of the crawl state the facts that the base model has read, in other words. Why labels and not
an annotator: data/annotate.py needs a language model that can read, which no laptop has.

Why so few facts: a model of 2.6 million parameters learns one from about a hundred readings, and two CPU cores read
some 4,000 tokens a second. With 80 diseases of nine facts to learn, some twenty readings each, it knew 8 points more, and had
forgotten everything else; 40 diseases of five facts fill the same minutes with four times as many readings of each.

Cost: about 15 seconds on one core, half of it the import of transformers. The same seed gives the same texts.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import miniature
import miniature_exam as exam
from documents import write_parquet
from miniature_templates import Table, brief, entry, leaflet, sheet
from nanomed import InputError, run_script
from nanomed.files import staging, write_json

FACTS = ("name", "organ", "symptom", "cause", "therapy", "test")
FORMS = (entry, brief, brief, sheet, leaflet)
CRAWL = dict.fromkeys(("id", "text", "url", "dump", "date"), "string")
LABELS = dict.fromkeys(("id", "text", "label", "model", "prompt_sha256"), "string")
TASK = """# Written by data/miniature_paper.py: four options, the likeliest whole answer is chosen.
task: miniature_medizin
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Frage: {{{{question}}}}\nAntwort:"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    diseases: int  # rows of the table of medicine, the others do not exist in this world
    things: int  # rows of every general table
    new: int  # documents of each form about a disease that the base has not read of
    known: int  # about one that it has
    general: int  # about every other thing
    exercises: int  # times that every question about a known disease is asked and answered
    chats: int
    crawl_general: int
    copies: int
    leaks: int
    labels: int
    questions: int
    following: int
    medical: int
    hidden: int
    layers: int


FULL = Size(diseases=80, things=10, new=6, known=3, general=2, exercises=6, chats=4000, crawl_general=700, copies=100,
            leaks=40, labels=600, questions=200, following=200, medical=60, hidden=192, layers=4)  # fmt: skip
FAST = Size(diseases=16, things=4, new=8, known=6, general=2, exercises=6, chats=1200, crawl_general=250, copies=20,
            leaks=10, labels=240, questions=40, following=40, medical=10, hidden=96, layers=3)  # fmt: skip


def tables(domain: str, size: Size) -> list[Table]:
    """The built-in tables, cut to the world's size by taking rows evenly; of a disease only the facts that are asked for."""
    n_rows, cut = size.diseases if domain == "med" else size.things, []
    for table in miniature.tables(domain):
        rows = table.rows
        if domain == "med":  # a row for which everything is known
            rows = [{k: v for k, v in row.items() if k in FACTS} for row in rows if row.keys() >= set(FACTS)]
        n = min(n_rows, len(rows))
        cut.append(replace(table, rows=[rows[i * len(rows) // n] for i in range(n)]))
    return cut


def halves(table: Table) -> tuple[Table, Table]:
    """(diseases that the base reads of, those of the crawl and the examination): every other row."""
    return replace(table, rows=table.rows[::2]), replace(table, rows=table.rows[1::2])


def texts(tables: list[Table], times: int, seed: int) -> list[str]:
    """`times` documents of each form about every row, shuffled, none twice."""
    rng = random.Random(f"{seed}/texts")
    found = {form(rng, table, row) for table in tables for row in table.rows for form in FORMS for _ in range(times)}
    return rng.sample(sorted(found), len(found))


def split(found: list[str]) -> tuple[list[str], list[str]]:
    """(held out, the rest)."""
    n = max(10, round(miniature.HELD_OUT * len(found)))
    return found[:n], found[n:]


def crawl(medical: list[str], general: list[str], questions: list[dict], size: Size, seed: int) -> tuple[list, dict]:
    """(documents, truth: ids by kind). A copy differs from its original in white space at most."""
    rng = random.Random(f"{seed}/crawl")
    rows = [(f"med-{i:05d}", text, "medical") for i, text in enumerate(medical)]
    copies = [(f"copy-{i:05d}", text + "\n" * (n % 2), "copy") for n, (i, text) in enumerate(
        rng.sample([*enumerate(medical)], size.copies))]  # fmt: skip
    leaks = [(f"leak-{i:05d}", f"{rng.choice(medical)}\n\n{quote(question)}", "leak")
             for i, question in enumerate(rng.sample(questions, size.leaks))]  # fmt: skip
    rows += copies + leaks + [(f"general-{i:05d}", text, "general") for i, text in enumerate(general)]
    rng.shuffle(rows)
    truth = {kind: [name for name, _, of in rows if of == kind] for kind in ("medical", "copy", "leak", "general")}
    return rows, truth


def quote(question: dict) -> str:
    """A question with its options and answer, as a site for learners prints it."""
    options = [f"{letter}) {option}" for letter, option in zip("abcd", question["options"], strict=True)]
    return "\n".join([question["question"], *options, f"Lösung: {question['options'][question['answer']]}"])


def write_jsonl(path: Path, records: list[dict]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_crawl(folder: Path, rows: list[tuple[str, str, str]], size: Size, seed: int) -> None:
    """crawl/ in two files, and the labelled sample."""
    half = -(-len(rows) // 2)
    for part, start in enumerate((0, half)):
        documents = ({"id": name, "text": text, "url": f"https://example.org/{name}", "dump": "MINI-2026-01",
                      "date": "2026-01-01"} for name, text, _ in rows[start : start + half])  # fmt: skip
        write_parquet(folder / "crawl" / f"part-{part}.parquet", documents, CRAWL, {})
    sample = random.Random(f"{seed}/labels").sample(rows, size.labels)
    labels = ({"id": name, "text": text, "label": "not_medical" if kind == "general" else "medical",
               "model": "truth", "prompt_sha256": "none"} for name, text, kind in sample)  # fmt: skip
    write_parquet(folder / "labels.parquet", labels, LABELS, {})


def write_models(folder: Path, read: list[str], size: Size, seed: int) -> None:
    """model/ without weights, and encoder/, small and random, with the same tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    tokenizer = miniature.train_tokenizer(read)
    shape = dict(hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.hidden // 32,
                 num_key_value_heads=size.hidden // 32, intermediate_size=3 * size.hidden)  # fmt: skip
    miniature.write_model(folder / "model", tokenizer, shape)
    torch.manual_seed(seed)
    config = XLMRobertaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2,
                              num_attention_heads=2, intermediate_size=128, max_position_embeddings=66,
                              pad_token_id=tokenizer.token_to_id(miniature.END))  # fmt: skip
    XLMRobertaModel(config).save_pretrained(folder / "encoder")
    marks = dict(pad_token=miniature.END, model_max_length=64)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder / "encoder")


def build(out: Path, size: Size, seed: int) -> None:
    """Write everything to a staging folder beside `out`."""
    with staging(out, "--out") as partial:
        fill(partial, out, size, seed)


def fill(partial: Path, out: Path, size: Size, seed: int) -> None:
    """Write everything to the folder `partial`, which becomes `out`."""
    (known, new), general_tables = halves(tables("med", size)[0]), tables("general", size)
    questions, rng = exam.questions(seed, new, size.questions), random.Random(f"{seed}/build")
    following = list(exam.instructions(seed + 1, general_tables, size.following))
    taken = frozenset(prompt for prompt, _ in following)
    # As many questions about known diseases as about all other things.
    chats = list(exam.instructions(seed, general_tables + [known] * len(general_tables), size.chats, taboo=taken))
    val_med, medical = split(texts([new], size.new, seed))
    val_general, general = split(texts(general_tables, size.general, seed))
    solved = [text for i in range(size.exercises) for text in exam.exercises(seed + i, known)]
    prose = general + texts([known], size.known, seed) + solved
    elsewhere = sorted({*texts(general_tables, size.general, seed + 1)} - {*general, *val_general})
    rows, truth = crawl(medical, rng.sample(elsewhere, min(size.crawl_general, len(elsewhere))), questions, size, seed)

    for name, found in (("prose", prose), ("val-med", val_med), ("val-general", val_general)):
        records = [{"id": f"{name}-{i:05d}", "text": text} for i, text in enumerate(found)]
        write_jsonl(partial / f"{name}.jsonl", records)
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in chats]
    write_jsonl(partial / "chats.jsonl", [{"messages": messages} for messages in turns])
    asked = [{"id": f"following-{i:03d}", "prompt": p, "kind": "following", "right": a}
             for i, (p, a) in enumerate(following)]  # fmt: skip
    write_jsonl(partial / "prompts.jsonl", asked + exam.consultations(seed, new, size.medical))
    write_jsonl(partial / "exam" / "medizin.jsonl", questions)
    (partial / "exam" / "medizin.yaml").write_text(TASK.format(path=(out / "exam" / "medizin.jsonl").resolve()))
    write_crawl(partial, rows, size, seed)
    write_models(partial, prose + medical + [f"{p} {a}" for p, a in chats], size, seed)
    write_json(partial / "truth.json", {"seed": seed, "size": asdict(size), "crawl": truth})


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of all texts and choices (default 0)")
    parser.add_argument("--fast", action="store_true", help="a world of a few facts, for tests")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists; choose another, or delete it")
    build(args.out, FAST if args.fast else FULL, args.seed)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)

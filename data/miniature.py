"""The built-in corpus: German medicine and general German, written from tables of facts, in seconds.

What: `OUT/model/` (a Qwen2 folder without weights: config, tokenizer, chat template), `OUT/text/*.jsonl` and the same
texts as token bins in `OUT/{med,general,val-med,val-general}/`. About 3.6 MB of text, half of it medical.

Why: the whole project can then be run end to end on a laptop, with no download. Every statement is made by a
template from a row of miniature_tables/, so that what a model should know after reading it is known exactly, and can be
asked for. The general half is what a base model reads first; the medical half is what it is continued on.

Held out are documents, not facts: val-med and val-general (5 % of the documents) state facts that other documents, in
other words, state for training. A held-out document tells whether the knowledge of this corpus was learnt; a fact
that occurs nowhere else could only be guessed.

Cost: about four seconds on one core, 6 MB on disk. The same seed gives the same bytes.

    python data/miniature.py --out bins/miniature
"""

import argparse
import contextlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from miniature_templates import (
    MAX_CHARS,
    MIN_CHARS,
    Row,
    Table,
    brief,
    compare,
    entry,
    find,
    gallery,
    leaflet,
    listing,
    note,
    quiz,
    read_table,
    sheet,
)
from nanomed import InputError, run_script
from nanomed.files import staging, write_json

SETS = ("med", "general", "val-med", "val-general")
TABLES = {
    "med": ("medicine",),
    "general": ("countries", "cities", "elements", "animals", "plants", "works", "inventions", "crafts"),
}
FORMS = {  # how often each form of document is tried for a row; general rows have fewer facts, hence more documents
    "med": {entry: 2, brief: 2, sheet: 1, leaflet: 1, note: 1, quiz: 2},
    "general": {entry: 3, brief: 2, sheet: 2, leaflet: 2, note: 2, quiz: 3},
}
GALLERIES = {"med": 0.4, "general": 1.5}  # documents per row
COMPARISONS = {"med": 1, "general": 1.5}
LISTS = 3  # of each value that several rows share
HELD_OUT = 0.05

END, START_TURN, END_TURN = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 4096
# Qwen2's pre-tokenizer: words with the space before them, single digits, punctuation, white space.
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}


def tables(domain: str) -> list[Table]:
    """The tables of facts of a domain, `med` or `general`: their rows and templates."""
    return [read_table(name, None if domain == "med" else "general") for name in TABLES[domain]]


def groups(table: Table) -> Iterator[tuple[str, list[Row]]]:
    """The columns by which rows may be listed, with the rows of each value that at least three rows share."""
    for column in table.columns:
        if find(table, f"{column} group"):
            sharing = defaultdict(list)
            for row in table.rows:
                if column in row:
                    sharing[row[column]].append(row)
            yield from ((column, rows) for rows in sharing.values() if len(rows) >= 3)


def write_table(table: Table, domain: str, seed: int) -> Iterator[str]:
    """All documents of one table; each row draws from its own generator, so that a new row changes no other."""
    for row in table.rows:
        rng = random.Random(f"{seed}/{table.name}/{row['name']}")
        for form, count in FORMS[domain].items():
            yield from (form(rng, table, row) for _ in range(count))
    rng = random.Random(f"{seed}/{table.name}")
    shared = list(groups(table))
    for column, rows in shared * LISTS:
        yield listing(rng, table, column, rng.sample(rows, min(len(rows), rng.randint(5, 15))))
    for _ in range(round(COMPARISONS[domain] * len(table.rows))):
        sources = [rows for _, rows in shared] if shared and rng.random() < 0.8 else [table.rows]
        yield compare(rng, table, *rng.sample(rng.choice(sources), 2))
    for _ in range(round(GALLERIES[domain] * len(table.rows))):
        yield gallery(rng, table, rng.sample(table.rows, rng.randint(3, 5)))


def documents(seed: int) -> dict[str, list[str]]:
    """The texts of the four sets. No text is in two sets, or twice in one."""
    sets = {}
    for domain in TABLES:
        written = (text for table in tables(domain) for text in write_table(table, domain, seed))
        texts = [text for text in dict.fromkeys(written) if MIN_CHARS <= len(text) <= MAX_CHARS]
        random.Random(f"{seed}/{domain}/order").shuffle(texts)
        n_held_out = round(HELD_OUT * len(texts))
        sets[f"val-{domain}"], sets[domain] = texts[:n_held_out], texts[n_held_out:]
    return {name: sets[name] for name in SETS}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte, so that any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer, shape: dict | None = None) -> None:
    """A Hugging Face model folder without weights; `shape` replaces entries of CONFIG."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": tokenizer.token_to_id(END), "eos_token_id": tokenizer.token_to_id(END_TURN)}
    write_json(folder / "config.json", {**CONFIG, **(shape or {}), **ids})
    write_json(folder / "generation_config.json", {**ids, "pad_token_id": ids["bos_token_id"], "do_sample": False})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TURN, "pad_token": END}
    limits = {"model_max_length": CONFIG["max_position_embeddings"], "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**settings, **limits, "chat_template": CHAT_TEMPLATE})


def build(out: Path, seed: int) -> None:
    """Write everything to a staging folder beside `out`."""
    from prepare import prepare  # it is slow to import, and --help does not need it

    engine = "auto" if find_spec("gigatoken") else "tokenizers"  # so small a corpus needs no warning that it is missing
    with staging(out, "--out") as partial:
        texts = documents(seed)
        write_model(partial / "model", train_tokenizer(texts["med"] + texts["general"]))
        (partial / "text").mkdir()
        for name in SETS:
            path = partial / "text" / f"{name}.jsonl"
            records = ({"id": f"{name}-{i:05d}", "text": text} for i, text in enumerate(texts[name]))
            path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
            with contextlib.redirect_stdout(None):  # it would speak of the temporary name
                bins = prepare([path], partial / "model", partial / name, engine=engine)
            print(f"{name}: {bins.n_docs:,} documents, {bins.n_tokens:,} tokens")
        write_json(partial / "miniature.json", {"seed": seed})


def check_existing(out: Path, seed: int) -> bool:
    """Whether `out` is this corpus already; an InputError if it is something else."""
    if not out.exists():
        return False
    try:
        found = json.loads((out / "miniature.json").read_text(encoding="utf-8"))["seed"]
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"{out} exists and is not a miniature corpus: remove it or choose another --out") from None
    if found != seed:
        raise InputError(f"{out} was made with --seed {found}, not {seed}: remove it or choose another --out")
    return True


def main() -> None:
    """The command line; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist, unless it is complete")
    parser.add_argument("--seed", type=int, default=0, help="another seed: the same facts in other words (default 0)")
    args = parser.parse_args()
    if check_existing(args.out, args.seed):
        print(f"{args.out} is complete: nothing to do")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    build(args.out, args.seed)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)

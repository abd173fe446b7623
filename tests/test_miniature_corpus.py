"""The built-in corpus: its tables are well formed, its German has no holes, its facts are there, its folder loads."""

import json
import re
import subprocess
import sys
import types
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

DATA = Path(__file__).resolve().parents[1] / "data"

import miniature  # noqa: E402
from miniature_grammar import SPECS, Phrase, contract  # noqa: E402
from miniature_templates import FOLDER, PLAIN, read_rows  # noqa: E402
from nanomed import InputError  # noqa: E402

SCRIPT = [sys.executable, str(DATA / "miniature.py")]
ALL_TABLES = [(domain, table) for domain in miniature.TABLES for table in miniature.tables(domain)]


@pytest.fixture(scope="module")
def sets() -> dict[str, list[str]]:
    return miniature.documents(0)


@pytest.fixture(scope="module")
def built(tmp_path_factory, sets) -> Path:
    out = tmp_path_factory.mktemp("miniature") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "documents", lambda _: sets)  # saves writing them again
        miniature.build(out, 0)
    return out


def forms(fact: Phrase | str) -> set[str]:
    """Every form that the fact may take in a text."""
    return {fact} if isinstance(fact, str) else {fact.declined(case, article) for case, article in SPECS.values()}


@pytest.mark.parametrize(
    ("cell", "spec", "text"),
    [
        ("ein~ trocken~ Husten:m + Fieber:n", "dat", "einem trockenen Husten und Fieber"),
        ("ein~ trocken~ Husten:m + Fieber:n", "ist|sind", "sind"),
        ("trocken~ Husten:m", "nom", "trockener Husten"),
        ("Infarkt|s:m", "des", "des Infarkts"),
        ("akut~ Zystitis:f", "Der", "Die akute Zystitis"),
        ("akut~ Zystitis:f", "ein", "eine akute Zystitis"),
        ("stark~ Schmerzen:p", "ein", "starke Schmerzen"),
        ("Herz|ens:n", "dem", "dem Herzen"),
        ("geschwollen~ Gelenke|n:p", "dat", "geschwollenen Gelenken"),
        ("Gelenke|n:p", "der", "die Gelenke"),
        ("Elefant|en:m", "den", "den Elefanten"),
        ("Elefant|en:m", "der", "der Elefant"),
        ("d~ Vereinigt~ Königreich|s:n", "gen", "des Vereinigten Königreichs"),
        ("dies~ bösartig~ Tumor|s:m", "dem", "diesem bösartigen Tumor"),
        ("Gras, Blätter|n und Rinde:p", "dat", "Gras, Blättern und Rinde"),
    ],
)
def test_phrases_decline(cell, spec, text):
    assert format(Phrase(cell), spec) == text


def test_prepositions_melt_with_the_article():
    assert contract("In dem Herzen, von dem Arzt, zu der Ärztin, in der Lunge") == ("Im Herzen, vom Arzt, zur Ärztin, in der Lunge")


def test_the_same_seed_gives_the_same_documents(sets):
    assert miniature.documents(0) == sets
    other = miniature.documents(1)
    assert all(set(other[name]) != set(sets[name]) for name in miniature.SETS)


def test_sizes(sets):
    size = {name: sum(len(text.encode()) for text in texts) for name, texts in sets.items()}
    assert 2e6 < size["med"] + size["general"] < 4e6
    assert 0.8 < size["med"] / size["general"] < 1.25
    for domain in miniature.TABLES:
        assert len(sets[f"val-{domain}"]) == pytest.approx(0.05 * (len(sets[domain]) + len(sets[f"val-{domain}"])), abs=1)
    assert all(200 <= len(text) <= 3000 for texts in sets.values() for text in texts)


def test_no_text_twice(sets):
    counts = Counter(text for texts in sets.values() for text in texts)
    assert max(counts.values()) == 1


def test_tables_are_large_enough():
    n_rows = Counter()
    for domain, table in ALL_TABLES:
        n_rows[domain] += len(table.rows)
    assert n_rows["med"] >= 300
    assert n_rows["general"] >= 300


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.tsv")), ids=lambda path: path.stem)
def test_cells_are_well_formed(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t")
    for line in lines:
        cells = line.split("\t")
        assert len(cells) == len(header), line
        for cell in cells:
            assert re.fullmatch(r"\S+( \S+)*", cell), line
    rows = read_rows(path)
    names = [str(row["name"]) for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        for column, fact in row.items():
            text = str(fact)
            assert not re.search(r"[{}~|+]|:[mfnp]\b", text), text
            assert isinstance(fact, str) == (column in PLAIN)


def test_icd_codes():
    codes = [row["icd"] for row in miniature.tables("med")[0].rows if "icd" in row]
    assert all(re.fullmatch(r"[A-Z]\d\d(\.\d{1,2})?", code) for code in codes)
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("table", [table for _, table in ALL_TABLES], ids=lambda table: table.name)
def test_every_fact_has_varied_sentences(table):
    columns = {"name", *table.columns}
    for column in table.columns:
        assert len(table.templates[column]) >= 8, column
        assert len({t.text for t in table.templates[column]}) == len(table.templates[column]), column
        assert len(table.templates[f"{column} ask"]) >= 3, column
        assert len(table.templates[f"{column} label"]) >= 2, column
        assert all(column in t.fields for t in table.templates[column]), column
    for section, templates in table.templates.items():
        if section != "gallery title":
            fields = {field.removeprefix("other_") for t in templates for field in t.fields}
            assert fields <= columns, section


def test_documents_have_no_holes(sets):
    for texts in sets.values():
        for text in texts:
            assert not re.search(r"[{}~|]|  | \.| ,|\.\.|\bNone\b|:[mfnp]\b", text), text
            assert not re.search(r"\b(in|an|von|bei|zu) dem\b", text, re.IGNORECASE), text
            assert "" not in text.split("\n\n"), text
            assert text == text.strip(), text


@pytest.mark.parametrize("domain", miniature.TABLES)
def test_every_fact_is_in_the_training_text(sets, domain):
    texts = [text.lower() for text in sets[domain]]
    with_word = defaultdict(set)
    for i, text in enumerate(texts):
        for word in re.findall(r"\w+", text):
            with_word[word].add(i)
    for table in (table for of, table in ALL_TABLES if of == domain):
        for row in table.rows:
            found = {
                i
                for name in map(str.lower, forms(row["name"]))
                for i in with_word[max(re.findall(r"\w+", name), key=len)]
                if name in texts[i]
            }
            about = "\n".join(texts[i] for i in found)
            for column in table.columns:
                assert column not in row or any(form.lower() in about for form in forms(row[column])), (
                    str(row["name"]),
                    column,
                )


def test_no_disease_in_the_general_text(sets):
    text = "\n".join(sets["general"] + sets["val-general"])
    words = set(re.findall(r"\w+", text))
    for row in miniature.tables("med")[0].rows:
        names = {form for column in ("name", "alias") if column in row for form in forms(row[column])}
        for name in names | {name[0].upper() + name[1:] for name in names}:
            assert not words.issuperset(re.findall(r"\w+", name)) or name not in text, name


def test_facts_read_as_plain_text():
    rows = {table.name: table.rows for _, table in ALL_TABLES}
    assert str(rows["medicine"][0]["name"]) == "Myokardinfarkt"
    assert str(rows["countries"][0]["river"]) == "der Rhein"


def test_a_malformed_cell_is_named(tmp_path):
    (tmp_path / "bad.tsv").write_text("name\torgan\nGicht:f\tFuß\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.tsv, line 2: 'Fuß' is not a phrase"):
        read_rows(tmp_path / "bad.tsv")


def test_the_tokenizer_is_deterministic_and_lossless(built, sets):
    again = miniature.train_tokenizer(sets["med"] + sets["general"])
    again.save(str(built.parent / "again.json"))
    assert (built.parent / "again.json").read_bytes() == (built / "model" / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_file(str(built / "model" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == miniature.VOCAB_SIZE
    texts = sets["val-med"] + sets["val-general"] + ["Emoji 🩺, 中文, \t\r\n  Leerraum"]
    assert [tokenizer.decode(e.ids) for e in tokenizer.encode_batch(texts)] == texts


def test_transformers_reads_the_model_folder(built):
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    config = AutoConfig.from_pretrained(built / "model")
    assert (config.model_type, config.hidden_size, config.head_dim, config.vocab_size) == ("qwen2", 256, 32, 4096)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.tie_word_embeddings
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (config.eos_token_id, config.bos_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hallo"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nHallo<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(chat)["input_ids"]) == chat


def test_the_folder_holds_texts_and_bins(built, sets):
    for name in miniature.SETS:
        records = [json.loads(line) for line in (built / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [record["text"] for record in records] == sets[name]
        assert len({record["id"] for record in records}) == len(records)
        assert json.loads((built / name / "manifest.json").read_text())["n_docs"] == len(records)


def test_an_interrupted_build_leaves_nothing_whole(tmp_path, monkeypatch, sets):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "prepare", types.SimpleNamespace(prepare=interrupted))
    monkeypatch.setattr(miniature, "documents", lambda _: {name: texts[:20] for name, texts in sets.items()})
    with pytest.raises(KeyboardInterrupt):
        miniature.build(tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
    assert not miniature.check_existing(tmp_path / "out", 0)


def test_what_is_printed_where_gigatoken_is_missing(tmp_path, monkeypatch, capsys, sets):
    import engines

    for module in (engines, miniature):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(miniature, "documents", lambda _: {name: texts[:20] for name, texts in sets.items()})
    miniature.build(tmp_path / "out", 0)
    out, err = capsys.readouterr()
    assert [line.split(", ")[0] for line in out.splitlines()] == [f"{name}: 20 documents" for name in miniature.SETS]
    assert "gigatoken" not in err


def test_command_line(built, tmp_path):
    done = subprocess.run([*SCRIPT, "--out", built], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{built} is complete: nothing to do\n")
    other_seed = subprocess.run([*SCRIPT, "--out", built, "--seed", "7"], capture_output=True, text=True)
    assert other_seed.returncode == 1
    assert other_seed.stderr.startswith(f"error: {built} was made with --seed 0, not 7")
    (tmp_path / "mine").mkdir()
    foreign = subprocess.run([*SCRIPT, "--out", tmp_path / "mine"], capture_output=True, text=True)
    assert foreign.returncode == 1
    assert foreign.stderr == f"error: {tmp_path / 'mine'} exists and is not a miniature corpus: remove it or choose another --out\n"

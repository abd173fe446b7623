"""Published question sets as the JSONL that the tasks of data/tasks read.

    python eval.py convert mmlux openGPT-X/mmlux
    python eval.py convert bioinstructqa German-full.json

SRC is a file, a folder with the files as they were published, or the data set's id on the Hugging Face hub. Translations
of one exam differ, and so do the scores: the source is part of every file's and task's name, and sources are never mixed.
Two files per task: NAME.jsonl, and NAME.dev.jsonl, whose questions serve as shots. If a source has no dev questions, the
first 5 of every task are taken from the test set, and a note says so. Existing questions are not overwritten.

    mmlux          openGPT-X/mmlux (now Eurolingua/mmlux): MMLU by DeepL; hendrycks_SUBJECT_DE_{test,dev}.jsonl
    mmmlu          openai/MMMLU: MMLU by human translators; test/mmlu_DE-DE.csv
    global-mmlu    CohereForAI/Global-MMLU: de/{test,dev}*.parquet, or that folder (needs pyarrow)
    bioinstructqa  BioMistral/BioInstructQA: German-full.json of its data.zip, or the zip; its MedQA with four options, and its
                   MMLU subjects, so that one translation can serve both halves of the paper's average
    medqa          MedQA's own layout, translated: phrases_no_exclude_{test,train}.jsonl

A machine translation may turn two options into the same word, or lose one. Such a question no longer has a right answer:
it is left out and named. A file in which more than one in 20 are like this is rejected.
"""

import argparse
import csv
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanomed import InputError, first_line
from nanomed.evaluation.questions import fault
from nanomed.files import new_folder, write_durably

SUBJECTS = (
    "clinical_knowledge",
    "medical_genetics",
    "anatomy",
    "professional_medicine",
    "college_biology",
    "college_medicine",
)
N_DEV = 5
DAMAGED = 0.05  # share of a file's questions that may be left out
LETTERS = "ABCDE"
Rows = Iterator[tuple[str, str, dict]]  # (split, subject, question); subject "" where a source has only one


# --- readers: a file of a source -> its questions ------------------------------------------------------------------


def read_mmlux(path: Path) -> Rows:
    """question, choices, answer (a number or a letter), id "anatomy/test/0"."""
    split = "dev" if path.stem.endswith("dev") else "test"
    for row in json_lines(path):
        yield (
            split,
            row["id"].split("/")[0].removesuffix("_DE"),
            made(row["id"], row["question"], row["choices"], row["answer"]),
        )


def read_mmmlu(path: Path) -> Rows:
    """Question, A, B, C, D, Answer, Subject ("anatomy", "anatomy_test.csv_de-DE.csv" or "anatomy_test-de-DE.csv")."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            subject = re.split(r"_test(?=[.-]|$)", row["Subject"])[0]
            yield "test", subject, made(f"{subject}/{number}", row["Question"], [row[x] for x in "ABCD"], row["Answer"])


def read_global_mmlu(path: Path) -> Rows:
    """sample_id, subject, question, option_a to option_d, answer."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("convert global-mmlu reads Parquet; pip install pyarrow") from None
    for row in pyarrow.parquet.read_table(path).to_pylist():
        options = [row[f"option_{x}"] for x in "abcd"]
        split = "dev" if path.name.startswith("dev") else "test"
        yield split, row["subject"], made(row["sample_id"], row["question"], options, row["answer"])


def read_bioinstructqa(path: Path) -> Rows:
    """identifier, corpus_name, question_translated, options_translated {letter: text}, correct_answer_letter."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("German-full.json")]
            if not names:
                raise InputError(f"{path}: holds no German-full.json")
            rows = json.loads(archive.read(names[0]))
    else:
        rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        corpus = row["corpus_name"]
        if corpus == "MedQA" or corpus.startswith("MMLU_"):
            options, answer = row["options_translated"], row["correct_answer_letter"]
            question = made(row["identifier"], row["question_translated"], [*options.values()], place(options, answer))
            yield "test", corpus.removeprefix("MedQA").removeprefix("MMLU_"), question


def read_medqa(path: Path) -> Rows:
    """question, options {letter: text}, answer_idx (a letter)."""
    split = "test" if "test" in path.stem else "dev"
    for number, row in enumerate(json_lines(path)):
        options, answer = row["options"], row["answer_idx"]
        yield split, "", made(f"{path.stem}/{number}", row["question"], [*options.values()], place(options, answer))


@dataclass(frozen=True)
class Source:
    """Where the questions of a source are."""

    read: Callable[[Path], Rows]
    patterns: tuple[str, ...]  # of its files, in a folder and on the hub
    exams: tuple[str, ...]  # which it may have; the first must be there. A task's name is EXAM_SOURCE or EXAM_SOURCE_SUBJECT


MMLU, MEDQA = "mmlu_de", "medqa_de"
SOURCES = {
    "mmlux": Source(read_mmlux, ("*_DE*test.jsonl", "*_DE*dev.jsonl"), (MMLU,)),
    "mmmlu": Source(read_mmmlu, ("*mmlu_DE-DE.csv",), (MMLU,)),
    "global-mmlu": Source(read_global_mmlu, ("de/test*.parquet", "de/dev*.parquet"), (MMLU,)),
    "bioinstructqa": Source(read_bioinstructqa, ("*German-full.json", "data.zip"), (MEDQA, MMLU)),
    "medqa": Source(read_medqa, ("*test.jsonl", "*train.jsonl"), (MEDQA,)),
}


def task_names(source: str, exam: str) -> list[str]:
    """The tasks of an exam of a source: one a subject of MMLU, MedQA is one."""
    subjects = [f"_{subject}" for subject in SUBJECTS] if exam == MMLU else [""]
    return [f"{exam}_{source.replace('-', '_')}{subject}" for subject in subjects]


def made(name: object, question: str, options: list[str], answer: int | str) -> dict:
    """A question of ours; answer: a place from 0, or a letter."""
    place = LETTERS.index(answer.strip().upper()) if isinstance(answer, str) else answer
    return {
        "id": str(name),
        "question": question.strip(),
        "options": [str(o).strip() for o in options],
        "answer": place,
    }


def place(options: dict[str, str], letter: str) -> int:
    """The letter's place among the options; -1 if it is none of them."""
    return list(options).index(letter) if letter in options else -1


def json_lines(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file."""
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    return (json.loads(line) for line in lines if line.strip())


# --- the command ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add = parser.add_argument
    add("source", choices=SOURCES, help="which published set")
    add("src", metavar="SRC", help="file, folder or hub id of it")
    add("out", metavar="OUT", type=Path, nargs="?", default=Path("data/tasks/questions"),
        help="folder for the JSONL files (default data/tasks/questions, where the tasks look)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Write every task's two files; none if one of them is there with other questions."""
    source = SOURCES[args.source]
    found: dict[str, dict[str, list[dict]]] = {}
    for path in find_files(args.src, source.patterns):
        for split, subject, question in checked(path, source.read):
            if subject in SUBJECTS or not subject:
                exam = MMLU if subject else MEDQA
                name = task_names(args.source, exam)[SUBJECTS.index(subject) if subject else 0]
                found.setdefault(name, {"test": [], "dev": []})[split].append(question | {"subject": subject or exam})
    for exam in source.exams:
        lacks = [name for name in task_names(args.source, exam) if name not in found]
        if lacks and (exam == source.exams[0] or len(lacks) < len(task_names(args.source, exam))):
            raise InputError(f"{args.src}: holds no questions of {lacks[0]}; is it what {args.source} published?")
    files, notes = {}, []
    for name, splits in found.items():
        test, dev, note = split_task(name, splits)
        files |= {args.out / f"{name}.dev.jsonl": dev, args.out / f"{name}.jsonl": test}
        notes.append(f"{args.out / name}.jsonl: {len(test)} questions, {len(dev)} for shots{note}")
    texts = {path: "".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions) for path, questions in files.items()}
    for path, text in texts.items():  # all are checked before the first is written
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise InputError(f"{path}: exists already with other questions; move it away first")
    new = [path for path in texts if not path.exists()]
    with new_folder(args.out):
        try:
            for path, text in texts.items():
                write_durably(path, text)
        except BaseException:  # half of a source's tasks would look like all of them
            for path in new:
                path.unlink(missing_ok=True)
            raise
    print(*notes, sep="\n")


def find_files(src: str, patterns: Iterable[str]) -> list[Path]:
    """The file, or the matching files of a folder or a hub data set."""
    path = Path(src)
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = download(src, [*patterns, *(f"**/{p}" for p in patterns)])
    # By the end of the whole path: the folder given may be the one that a pattern names.
    files = sorted(f for f in path.rglob("*") if any(f.absolute().match(pattern) for pattern in patterns))
    if not files:
        raise InputError(f"{src}: has none of {', '.join(patterns)}")
    return files


def download(name: str, patterns: list[str]) -> Path:
    """The files of a data set on the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (OSError, HFValidationError, ValueError) as error:
        raise InputError(f"{name}: no such file or folder, and the hub says: {first_line(error)}") from error


def checked(path: Path, read: Callable[[Path], Rows]) -> Rows:
    """The sound questions of a file; the others are named. InputError if there are many, or the layout is different."""
    number, damaged = 0, []
    try:
        for split, subject, question in read(path):
            number += 1
            n_options = len(question["options"])
            if wrong := fault(question) or (n_options != 4 and f"has {n_options} options, expected 4"):
                damaged.append(f"{question['id']}: {wrong}")
            else:
                yield split, subject, question
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: after question {number}: not as published ({type(error).__name__}: {error})") from None
    if len(damaged) > number * DAMAGED:
        raise InputError(f"{path}: {len(damaged)} of {number} questions are damaged, the first {damaged[0]}")
    for what in damaged:
        print(f"{path}: left out {what}", file=sys.stderr)


def split_task(name: str, splits: dict[str, list[dict]]) -> tuple[list[dict], list[dict], str]:
    """(test questions, dev questions, note on where the latter are from). InputError if there are no test questions."""
    test, dev, note = splits["test"], splits["dev"][:N_DEV], ""
    if not dev:
        test, dev, note = test[N_DEV:], test[:N_DEV], f" (its first {N_DEV}: the source has no dev questions)"
    if not test:
        raise InputError(f"{name}: the source has no test questions; is the test file there?")
    return test, dev, note

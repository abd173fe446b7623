"""Clean: documents + scores → the corpus, with a report of what was left out and a data card.

    python data/clean.py fineweb/*.parquet --scores sweep --classifier clf --eval data/tasks/questions/*.jsonl --out finemed-de

1. Each input, in parallel: documents at or above the threshold that contain no question of an evaluation set
   (decontaminate.py), to OUT/kept/NAME.parquet with the hash of their text.
2. Over all inputs: of equal texts the first stays (equal as normalising.py sees them), and of equal ids; what stays goes
   to OUT/corpus/NAME.parquet: id, text, url, dump, date, score, and what --keep-columns names. url, dump and date are
   kept so that anybody can attribute a document, rebuild the corpus, or have a document taken down. The folder is rebuilt
   as OUT/corpus.partial and renamed when complete.
3. decontamination.jsonl (every hit, kept documents too), report.json, report.md, README.md (the data card).

FineWeb2 is already filtered and near-deduplicated; heuristics for prose are not applied again, since dosages, tables
and lists, common in medicine, fail them. Personal data is counted, not removed. An interrupted run resumes; report.json
is written last. Costs: see data/README.md; memory 150 bytes per kept document.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import normalising
from card import write_card, write_report
from columns import check_names, types_of
from decontaminate import Questions
from documents import EXTRA, read_documents, remove_orphans, write_parquet
from encoding import start_worker
from finding import check_file, read_record
from keeping import CORPUS, Job, keep_file, load_questions, part_of, scores_of
from nanomed import InputError, run_script
from nanomed.files import sha256, write_json
from outputs import claimed_folder, release_empty
from personal import PATTERNS, count_personal
from scoring import classifier_identity, find_inputs
from sweep import read_classifier

SCRIPT = "data/clean.py"
REPORTS = ("report.json", "decontamination.jsonl", "report.md", "README.md")


def first_of_equals(hashes: np.ndarray) -> np.ndarray:
    """bool (N,): is this the first row with its value? hashes: S32 (N,)."""
    first = np.zeros(hashes.size, bool)
    first[np.unique(hashes, return_index=True)[1]] = True  # the index of the first occurrence
    return first


def choose_first(files: list[Path], out: Path, counts: Counter) -> list[np.ndarray]:
    """Per input, which rows of kept/NAME.parquet stay: of equal texts and then of equal ids the first."""
    text, sizes = read_hashes(files, out, "text_hash")
    ids, _ = read_hashes(files, out, "id_hash")
    stays = first_of_equals(text)
    counts["duplicate_texts"] = int((~stays).sum())
    rows = np.flatnonzero(stays)
    again = rows[~first_of_equals(ids[rows])]
    stays[again] = False
    counts["duplicate_ids"] = again.size
    return np.split(stays, np.cumsum(sizes)[:-1])


def read_hashes(files: list[Path], out: Path, key: str) -> tuple[np.ndarray, list[int]]:
    """(S32 (N,) hashes of all kept documents, how many each input has): 32 bytes each, no Python string of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for path in files:
        column = pq.read_table(part_of(path, out, "kept"), columns=[key])[key].cast(pa.binary()).cast(pa.binary(32))
        parts.append(np.frombuffer(column.combine_chunks().buffers()[1] or b"", "S32"))
    return np.concatenate(parts), [part.size for part in parts]


def chosen_documents(kept: Path, stays: np.ndarray, totals: dict, more: tuple[str, ...] = ()) -> Iterator[dict]:
    """Stage 2 of one input: what stays, with `more` columns; personal data and dumps are counted here."""
    for document, stay in zip(read_documents(kept, ("id", "text"), (*EXTRA, "score", *more)), stays, strict=True):
        if stay:
            totals["counts"]["kept"] += 1
            totals["text_bytes"] += len(document["text"].encode())
            totals["dumps"][document["dump"] or "unknown"] += 1
            count_personal(document["text"], totals["personal"])
            yield document


def withdraw_corpus(out: Path) -> Path:
    """OUT/corpus.partial, empty. An earlier run's corpus is removed with its reports: it may be of other inputs."""
    partial = out / "corpus.partial"
    for name in REPORTS:
        (out / name).unlink(missing_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    if (out / "corpus").exists():
        os.replace(out / "corpus", partial)  # first by one rename: a kill while files go must leave no part of it
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def clean(inputs: list[str], job: Job, facts: dict, workers: int) -> dict:
    """Both stages and the reports; returns what report.json holds. facts: of classifier and source, for the card."""
    files, out = find_inputs(inputs, Path(job.out)), Path(job.out)
    questions = load_questions(job.eval_sets)
    for path in files:
        scores_of(path, job)
    job = replace(job, kept_columns=tuple(types_of(files, [name for name, _ in job.kept_columns]).items()))
    columns = CORPUS | dict(job.kept_columns)
    with claimed_folder(out, ("kept", "corpus", "corpus.partial", *REPORTS), SCRIPT):
        try:
            records = list(tqdm(keep_all(job, files, workers), total=len(files), desc="keep", unit=" files", disable=None))
        finally:
            for path in files:
                remove_orphans(part_of(path, out, "kept"))  # of workers that were ended
        counts = sum((Counter(record["counts"]) for record in records), Counter())
        stays = choose_first(files, out, counts)
        if not any(rows.any() for rows in stays):
            withdraw_kept(files, out)
            raise InputError(f"{', '.join(map(str, inputs))}: no document was kept; the threshold is {job.threshold}")
        hits = [hit for record in records for hit in record["hits"]]
        report = about_questions(questions, hits) | facts
        try:
            report = write_corpus(files, out, stays, counts, columns) | report
            write_reports(out, report, hits)
        except OSError as error:
            raise InputError(f"{out}: cannot be written: {error.strerror}; free space, then run again") from None
    return report


def withdraw_kept(files: list[Path], out: Path) -> None:
    """Remove what stage 1 wrote, where it is of no use: it would hinder another threshold in the same folder."""
    for path in files:
        kept = part_of(path, out, "kept")
        kept.with_suffix(".json").unlink()
        kept.unlink()
    with contextlib.suppress(OSError):  # other inputs' are there
        (out / "kept").rmdir()
    release_empty(out, SCRIPT)


def write_corpus(files: list[Path], out: Path, stays: list[np.ndarray], counts: Counter, columns: dict) -> dict:
    """Stage 2 of all inputs: OUT/corpus, which is there whole or not at all; what was counted. columns: as of write_parquet."""
    more = tuple(name for name in columns if name not in CORPUS)
    totals = {"counts": counts, "text_bytes": 0, "dumps": Counter(), "personal": {name: Counter() for name in PATTERNS}}
    partial = withdraw_corpus(out)
    for path, rows in tqdm([*zip(files, stays, strict=True)], desc="corpus", unit=" files", disable=None):
        kept = part_of(path, out, "kept")
        write_parquet(partial / kept.name, chosen_documents(kept, rows, totals, more), columns, {})
    os.replace(partial, out / "corpus")
    return totals | {"columns": [*columns]}


def about_questions(questions: Questions, hits: list[dict]) -> dict:
    """What the report says about the evaluation sets."""
    eval_sets = {name: {"records": n, "dropped": 0, "listed": 0} for name, n in questions.n_records.items()}
    for hit in hits:
        eval_sets[hit["set"]]["dropped" if hit["drop"] else "listed"] += 1
    short = {"by_options": questions.by_options, "too_short": questions.too_short}
    return {"eval_sets": eval_sets, "eval_records": short}


def write_reports(out: Path, report: dict, hits: list[dict]) -> None:
    """The four files about the corpus, report.json last."""
    with (out / "decontamination.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(hit, ensure_ascii=False) + "\n" for hit in hits)
    write_report(out, report)
    write_card(out, report)
    write_json(out / "report.json", report)


def keep_all(job: Job, files: list[Path], workers: int) -> Iterator[dict]:
    """Stage 1 of all inputs, in order."""
    if workers == 1 or len(files) == 1:
        yield from (keep_file(job, path) for path in files)
        return
    with ProcessPoolExecutor(min(workers, len(files)), multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            yield from pool.map(functools.partial(keep_file, job), files)
        except BrokenProcessPool:
            raise InputError("a worker died, probably out of memory; run again with fewer --workers (it resumes)") from None
        except KeyboardInterrupt:  # which workers do not see: what they have begun may take minutes, and is begun anew
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


# ---- the command line ----


def plan(args: argparse.Namespace) -> tuple[Job, dict]:
    """What the workers and the card need to know; InputError if the scores are another classifier's."""
    about = read_classifier(args.classifier)
    swept = read_record(args.scores / "sweep.json", "data/sweep.py")
    found = classifier_identity(args.classifier)
    if swept.get("classifier_sha256") != found:
        what = f"classifier_sha256 is {swept.get('classifier_sha256')}, but {args.classifier} has {found}"
        raise InputError(f"{args.scores / 'sweep.json'}: {what}; give the classifier that made the scores")
    threshold = about["threshold"] if args.threshold is None else args.threshold
    sets = []
    for path in args.eval:
        check_file(path, "an evaluation set")
        try:
            sets.append([str(path), sha256(path)])  # hits name their set
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; expected an evaluation set") from None
    keys = {"text_key": args.text_key, "id_key": args.id_key}
    scored = {key: swept.get(key) for key in ("max_chars", "max_tokens", "dtype", "text_key")}  # what else decides a score
    keep = check_names(args.keep_columns, ("id", "text", *EXTRA), ("score", "text_hash", "id_hash"))
    decides = [found, scored, threshold, sets, keys, normalising.VERSION, keep]
    identity = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    job = Job(str(args.scores), str(args.out), threshold, tuple(map(str, args.eval)), **keys, identity=identity,
              kept_columns=tuple((name, None) for name in keep))  # fmt: skip
    facts = {"threshold": threshold, "classifier_sha256": found, "source": args.source, "language": args.language}
    measured = ("precision", "recall", "target_precision", "n_report") if threshold == about["threshold"] else ()
    facts |= {key: about[key] for key in (*measured, "base_model", "prompt_sha256", "annotator") if key in about}
    return job, facts


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Build the corpus from documents and scores. An interrupted run resumes.",
        epilog="example: python data/clean.py fineweb/*.parquet --scores sweep --classifier clf --out finemed-de",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="the documents that data/sweep.py scored")
    add("--scores", required=True, type=Path, metavar="SWEEP", help="the folder that data/sweep.py wrote")
    add("--classifier", required=True, type=Path, metavar="CLF", help="the folder that data/classify.py wrote")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the corpus goes")
    add(
        "--eval",
        nargs="*",
        default=[],
        type=Path,
        metavar="FILE",
        help="evaluation sets to decontaminate against: .jsonl[.gz|.zst], .parquet",
    )
    add("--threshold", type=float, metavar="T", help="instead of CLF/threshold.json's")
    add(
        "--source",
        default="HuggingFaceFW/fineweb-2",
        metavar="ID",
        help="source data set, for the data card (default: %(default)s)",
    )
    add("--language", default="de", metavar="CODE", help="the same (default: %(default)s)")
    add("--text-key", default="text", metavar="KEY", help="column of the text (default: %(default)s)")
    add("--id-key", default="id", metavar="KEY", help="column of the identifier (default: %(default)s)")
    add("--keep-columns", nargs="+", default=[], metavar="KEY", help="more columns to keep (url, dump and date always are)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: the CPUs)")
    return parser.parse_args(argv)


def main() -> None:
    """Bad input ends it with one line and exit status 1."""
    args = parse_arguments()
    job, facts = plan(args)
    report = clean(args.inputs, job, facts, max(1, args.workers))
    counts = report["counts"]
    print(f"{args.out}: {counts['kept']:,} of {counts['documents']:,} documents kept, {report['text_bytes']:,} bytes of text")
    left_out = ("empty", "below_threshold", "contaminated", "duplicate_texts", "duplicate_ids")
    print("left out: " + ", ".join(f"{counts[key]:,} {key.replace('_', ' ')}" for key in left_out))


if __name__ == "__main__":
    run_script(main)

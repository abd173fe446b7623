"""Audit: what are the annotator's labels worth? A person labels a few documents without seeing theirs; F1 with its interval.

    python data/annotate.py labels.parquet --audit 300      # once to get labels.audit.csv, once when `human` is filled

Medical pages are rare (under 2 % of the German web), so a plain random sample would hold a handful of them. Half the
sheet is drawn from the documents labelled medical and half from those labelled not medical, in random order, the label
not shown; each half then stands for the whole of its stratum. With M and N documents in the strata, p the share of
truly medical ones in the first and q in the second:

    precision = p     recall = pM / (pM + qN)     F1 = 2pM / (M + pM + qN)

p and q get their Jeffreys posteriors Beta(hits + ½, misses + ½); the interval is the middle 95 % of F1 under 100,000
draws. So even a sheet without a miss claims no certainty: q may be small, but N is large.
`invalid` labels are in no stratum: they are not trained on.
"""

import csv
import hashlib
import heapq
from collections import Counter
from pathlib import Path

import numpy as np

from documents import read_documents
from nanomed import InputError

STRATA = ("medical", "not_medical")
HUMAN = {"1": True, "0": False}


def audit(labels: Path, n: int) -> None:
    """Write the sheet beside the labels if it is not there, else print what the filled sheet says."""
    sheet = labels.with_suffix(".audit.csv")
    if not sheet.exists():
        write_sheet(labels, sheet, n)
        print(f"{sheet}: fill the column `human` with 1 (medical) or 0 (not medical) in all {n} rows, then run this again")
        return
    human = read_sheet(sheet, n)
    sizes, hits, seen = Counter(), Counter(), Counter()
    for row in read_documents(labels, ("id", "label")):
        sizes[row["label"]] += 1
        if row["id"] in human:
            seen[row["label"]] += 1
            hits[row["label"]] += human.pop(row["id"])
    if human:
        raise InputError(f"{sheet}: id {next(iter(human))!r} is not in {labels}; the sheet belongs to other labels")
    if unlabelled := [stratum for stratum in STRATA if not seen[stratum]]:
        raise InputError(f"{sheet}: has no document labelled {unlabelled[0]}, so neither recall nor F1 can be computed")
    print(f"{sheet}: {sum(seen.values())} documents judged, representing {sizes['medical'] + sizes['not_medical']:,}")
    for name, (value, low, high) in figures(sizes, hits, seen).items():
        print(f"{name:10} {value:6.1%}  [{low:.1%}, {high:.1%}]")


def write_sheet(labels: Path, sheet: Path, n: int, max_chars: int = 4000) -> None:
    """A CSV (id, human, text) of n documents, half from each label where there are enough, in random order."""
    heaps: dict[str, list] = {stratum: [] for stratum in STRATA}
    for row in read_documents(labels, ("id", "text", "label")):
        if row["label"] in heaps:
            heap, lot = heaps[row["label"]], hashlib.blake2b(row["id"].encode(), digest_size=8).digest()
            heapq.heappush(heap, (_reversed(lot), row["id"], row["text"][:max_chars]))
            if len(heap) > n:
                heapq.heappop(heap)
    drawn = {stratum: sorted(heap, reverse=True) for stratum, heap in heaps.items()}
    if not all(drawn.values()) or sum(map(len, drawn.values())) < n:
        found = ", ".join(f"{len(rows)} {stratum}" for stratum, rows in drawn.items())
        raise InputError(f"{labels}: too few labels for --audit {n}, some of both are needed: {found}")
    n_medical = min(len(drawn["medical"]), max(n // 2, n - len(drawn["not_medical"])))
    rows = sorted(drawn["medical"][:n_medical] + drawn["not_medical"][: n - n_medical], reverse=True)
    with sheet.open("x", encoding="utf-8-sig", newline="") as file:  # with the BOM by which spreadsheets recognise UTF-8
        writer = csv.writer(file)
        writer.writerow(("id", "human", "text"))
        writer.writerows((identity, "", text) for _, identity, text in rows)


def _reversed(lot: bytes) -> bytes:
    """Such that the greatest becomes the least: heapq keeps the greatest of these, which are the least lots."""
    return bytes(255 - byte for byte in lot)


def read_sheet(sheet: Path, n: int) -> dict[str, bool]:
    """id → judgement; InputError names the first row that has none."""
    try:
        with sheet.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = ";" if head.count(";") > head.count(",") else ","  # German spreadsheets save with ;
            rows = list(csv.DictReader(file, delimiter=delimiter))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{sheet}: cannot be read as UTF-8 CSV ({error}); save it as such") from None
    if rows and not {"id", "human"} <= rows[0].keys():
        raise InputError(f"{sheet}: has the columns {', '.join(map(str, rows[0]))}, expected id, human, text")
    if len(rows) != n:
        raise InputError(f"{sheet}: has {len(rows)} rows, but --audit is {n}; give that number, or delete the sheet")
    open_rows = [i for i, row in enumerate(rows, 2) if (row["human"] or "").strip() not in HUMAN]
    if open_rows:
        found = rows[open_rows[0] - 2]["human"]
        what = f"{len(open_rows)} of {n} rows are not judged yet, the first is row {open_rows[0]} ({found!r})"
        raise InputError(f"{sheet}: {what}; expected 1 or 0")
    return {row["id"]: HUMAN[row["human"].strip()] for row in rows}


def figures(sizes: dict, hits: dict, seen: dict, n_draws: int = 100_000) -> dict[str, tuple[float, float, float]]:
    """precision, recall and F1, each (value, low, high): see above.

    By label: sizes: all documents; seen: those judged; hits: those judged medical.
    """
    rng = np.random.default_rng(0)
    share = {s: hits[s] / seen[s] for s in STRATA}
    draws = {s: rng.beta(hits[s] + 0.5, seen[s] - hits[s] + 0.5, n_draws) for s in STRATA}
    values, spread, result = _rates(share, sizes), _rates(draws, sizes), {}
    for name, value in values.items():
        low, high = np.quantile(spread[name], (0.025, 0.975)).tolist()
        result[name] = (float(value), min(low, float(value)), max(high, float(value)))  # 0 and 1 lie within theirs
    return result


def _rates(share: dict, sizes: dict) -> dict:
    """precision, recall, F1 for the share of truly medical documents in either stratum."""
    found, missed = share["medical"] * sizes["medical"], share["not_medical"] * sizes["not_medical"]
    total = found + missed
    recall = np.divide(found, total, out=np.zeros_like(np.asarray(total, float)), where=np.asarray(total) > 0)
    return {"precision": share["medical"], "recall": recall, "F1": 2 * found / (sizes["medical"] + total)}

"""Documents as a crawl has them, in every kind of file that sample.py reads. No test itself."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def make(n: int) -> list[dict]:
    return [
        {"id": f"<urn:{i}>", "text": f"Text {i} über Fieber. " * (i % 5 + 1), "url": f"https://a.de/{i}", "dump": "CC-1",
         "date": "2024-01-01T00:00:00Z", "language_score": 0.9}
        for i in range(n)
    ]  # fmt: skip


def write(path: Path, documents: list[dict], row_group_size: int = 7) -> Path:
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(documents), path, row_group_size=row_group_size)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".zst"):
        path.write_bytes(pa.compress(lines.encode(), "zstd", asbytes=True))
    else:
        path.write_text(lines, "utf-8")
    return path

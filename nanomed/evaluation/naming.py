"""One name for one model on a page, whatever the runs call it.

knowledge is given names (NAME=PATH); generate records the path, or its --model, and judge and failures take that over. A
model that knowledge has examined has its name there: found by its path, or by the fingerprint that generate records.
"""

import re
from collections.abc import Callable
from pathlib import Path

from nanomed.files import read_json


def short(name: str) -> str:
    """The last part of a path or hub id."""
    return Path(name.removesuffix("/hf")).name or name


def place(name: str) -> str:
    """A model's folder, the same for a run folder and its hf/, and for a hub id and its folder in the hub's cache."""
    if cached := re.search(r"/models--([^/]+)/snapshots/[^/]+/?$", name):
        name = cached[1].replace("--", "/", 1)
    return str(Path(name).resolve()).removesuffix("/hf")


def namer(runs: list[dict]) -> Callable[[str], str]:
    """What answers call a model → its name on the page of these runs."""
    by_place, by_fingerprint, names = {}, {}, set()
    for about in runs:
        if about["kind"] == "knowledge":
            for name, model in about["config"]["models"].items():
                by_place.setdefault(place(model["path"]), name)
                by_fingerprint.setdefault(model["fingerprint"], name)
                names.add(name)
    made_by: dict[str, set] = {}  # what answers call a model → by fingerprint, the names of what wrote them
    for about in runs:
        for config in [about["config"]] if about["kind"] == "generate" else map(generated_with, about["data"]):
            if config.get("fingerprint") and config.get("model"):
                made_by.setdefault(config["model"], set()).add(by_fingerprint.get(config["fingerprint"]))

    def called(model: str) -> str:
        if model in made_by:  # a path says less: another model may lie there now
            [found] = made_by[model] if len(made_by[model]) == 1 else [None]
        else:
            found = by_place.get(place(model))
        return found or (model if short(model) in names else short(model))  # another model's name is not for this one

    return called


def generated_with(answers: str) -> dict:
    """The configuration that generate recorded beside a file of answers; empty if there is none."""
    record = Path(answers).with_suffix(".run") / "run.json"
    return read_json(record).get("config", {}) if record.is_file() else {}

"""mergekit's configurations: slerp and linear run here, everything else is left to mergekit; and a writer.

Run here: merge_method slerp or linear; `models:`, or `slices:` of one slice that spans all layers; filters
and gradients; dtype and out_dtype; tokenizer_source base. For anything beyond (another method, several slices, a
tokenizer union, LoRA references, ...) mergekit is called as a program, with the file unchanged.

One deliberate difference: with `dtype: bfloat16` mergekit rounds float32 inputs before the maths; we never do.
"""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from nanomed import InputError, first_line
from nanomed.merging.schedule import Rule, layer_of, read_rules, spell
from nanomed.merging.source import Checkpoint

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_KEYS = {"slices", "models", "merge_method", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source"}
_SLICE_KEYS = {"sources", "parameters", "base_model"}


@dataclass(frozen=True)
class Recipe:
    """A configuration that we run ourselves."""

    method: str  # slerp or linear
    models: list[str]  # base_model first, if there is one
    rules: list[list[Rule]]  # of slerp: t's, once; of linear: the weights', for every model
    normalize: bool  # linear: divide by the sum of the weights
    dtype: str | None  # of the result; None: BASE's
    n_layers: int | None  # that the slice spans; None: all


def read_yaml(path: Path, where: str):
    """The file's content. InputError, beginning with `where`, if there is none or it is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}: cannot be read as YAML ({first_line(error)})") from None


def read_config(path: Path) -> Recipe | str:
    """The configuration as a Recipe, or the name of what only mergekit can do. InputError if it is not a configuration."""
    config = read_yaml(path, str(path))
    if not isinstance(config, dict) or "merge_method" not in config:
        raise InputError(f"{path}: has no merge_method; expected a mergekit configuration")
    try:
        return _understand(path, config)
    except (TypeError, AttributeError, KeyError):  # a number where a list belongs, and the like
        raise InputError(f"{path}: is not laid out as a mergekit configuration; see mergekit's README") from None


def _understand(path: Path, config: dict) -> Recipe | str:
    method = config["merge_method"]
    if not isinstance(method, str):
        raise TypeError
    if method not in ("slerp", "linear"):
        return f"merge_method {method}"
    if unknown := sorted(key for key in config.keys() - _KEYS if config[key] is not None):
        return f"the field {unknown[0]}"
    if config.get("tokenizer_source") not in (None, "base"):
        return f"tokenizer_source {config['tokenizer_source']}"
    part = config
    if config.get("slices"):
        if len(config["slices"]) != 1:
            return "several slices"
        part = config["slices"][0]
        if unknown := sorted(part.keys() - _SLICE_KEYS):
            return f"the field {unknown[0]} of a slice"
    return _recipe(path, method, config, part)


def _recipe(path: Path, method: str, config: dict, part: dict) -> Recipe | str:
    """part: the configuration itself, or its one slice."""
    sources = part.get("sources") or part.get("models") or []
    names = [source.get("model") for source in sources]
    if not names or not all(isinstance(name, str) and "+" not in name for name in names):
        return "a model reference that is not a plain name"
    base = part.get("base_model") or config.get("base_model")
    ranges = {tuple(source.get("layer_range", ())) for source in sources}
    if len(ranges) > 1 or any(r and r[0] != 0 for r in ranges):
        return "a layer_range that is not all layers"
    n_layers = next((r[1] for r in ranges if r), None)
    if base is not None and base not in names and not config.get("slices"):
        sources = [*sources, {"model": base}]
    sources = sorted(sources, key=lambda source: source["model"] != base)  # base first: config and tokenizer are its
    names = [source["model"] for source in sources]
    dtype = config.get("out_dtype") or config.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"{path}: dtype {dtype} is not one of {', '.join(DTYPES)}")
    shared = [scope.get("parameters") or {} for scope in ((part, config) if part is not config else (config,))]
    if method == "slerp" and (len(names) != 2 or base not in names):
        raise InputError(f"{path}: slerp needs two models, one of them the base_model; found {names} and {base}")
    if config.get("base_model") not in (None, names[0]):
        return "a base_model that is not its slice's"
    if method == "slerp":
        return Recipe(method, names, [_rules(path, "t", shared)], True, DTYPES.get(dtype), n_layers)
    weights = [_rules(path, "weight", [source.get("parameters") or {}, *shared]) for source in sources]
    normalize = next((scope["normalize"] for scope in shared if "normalize" in scope), True)
    if not isinstance(normalize, bool):
        return "a conditional normalize"
    return Recipe(method, names, weights, normalize, DTYPES.get(dtype), n_layers)


def _rules(path: Path, name: str, scopes: list[dict]) -> list[Rule]:
    """The parameter's rules, the innermost scope's first: mergekit takes the first that matches."""
    return [rule for scope in scopes if name in scope for rule in read_rules(scope[name], str(path), name)]


def spell_config(base: Checkpoint, cpt: Checkpoint, rules: list[Rule], dtype: str) -> str:
    """The configuration that makes mergekit do the same: maths in float32, one rounding. dtype: the result's."""
    for checkpoint in (base, cpt):
        if (Path(checkpoint.name) / "run.json").is_file():
            raise InputError(f"--emit-mergekit: {checkpoint.name} is a run folder, which mergekit does not read; "
                             f"give its export, {Path(checkpoint.name) / 'hf'}")  # fmt: skip
    name = {ours: theirs for theirs, ours in DTYPES.items()}[dtype]
    n_layers = 1 + max((layer for layer in map(layer_of, base.tensors) if layer is not None), default=-1)
    sources = [{"model": model.name, "layer_range": [0, n_layers]} for model in (base, cpt)]
    config = {"slices": [{"sources": sources}], "merge_method": "slerp", "base_model": base.name,
              "parameters": {"t": spell(rules)}, "dtype": "float32", "out_dtype": name}  # fmt: skip
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None)


def call_mergekit(path: Path, out: Path) -> None:
    """mergekit itself, writing into `out`. InputError if it is not installed or fails."""
    if importlib.util.find_spec("mergekit") is None:
        raise InputError(f"{path}: needs mergekit, which is not installed: pip install -e '.[merge]'")
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(path), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    last, failed = "", False
    for line in process.stderr:  # its progress bars and warnings are passed on, its traceback becomes one line
        failed = failed or line.startswith("Traceback")
        if not failed:
            sys.stderr.write(line)
        if line.strip() and not line.strip().startswith("For further information"):  # pydantic's last word
            last = line.strip()
    if process.wait():
        raise InputError(f"{path}: mergekit failed: {last or f'exit status {process.returncode}'}")


def has_own_tokenizer(path: Path) -> bool:
    """Whether a configuration gives the result another tokenizer or chat template than its base model's."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return any(config.get(field) for field in ("tokenizer", "tokenizer_source", "chat_template"))


def models_of(path: Path) -> list[str]:
    """Names of the models in a configuration, base first, as far as they can be read."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        parts = [config, *(config.get("slices") or [])]
        sources = [source for part in parts for source in [*(part.get("sources") or []), *(part.get("models") or [])]]
        names = [config.get("base_model"), *(source.get("model") for source in sources)]
    except (TypeError, AttributeError):
        return []  # mergekit will say what is wrong with it
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))

"""t for every tensor: a number, a gradient over the layers, or filters by name, as mergekit spells them.

    t: 0.5                                     one t for all
    t: [0, 0.5, 1]                             a gradient: interpolated linearly from the first layer to the last
    t:                                         the first filter that is part of the tensor's name decides
      - filter: self_attn
        value: [0, 0.5, 0.3, 0.7, 1]
      - filter: mlp
        value: [1, 0.5, 0.7, 0.3, 0]
      - value: 0.5                             no filter: everything else

Embeddings, final norm and lm_head belong to no layer and take a gradient's first value: mergekit's rule, and a reason
to give a last entry without filter. (A model of one layer takes the last value there.)
"""

import re
from dataclasses import dataclass

from nanomed import InputError

PRESETS = {
    "uniform": 0.5,
    # mergekit's stock example, and BioMistral-7B-SLERP's: attention from CPT in the last layers, MLP in the first
    "gradient": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                 {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                 {"value": 0.5}],
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """A value, or a gradient of values, for the tensors whose name contains the filter."""

    filter: str  # "" takes every tensor
    values: tuple[float, ...]

    def at(self, x: float) -> float:
        """The gradient at depth x, from 0 (first layer) to 1 (last)."""
        place = x * (len(self.values) - 1)
        i = int(place)
        fraction = place - i
        return (1 - fraction) * self.values[i] + fraction * self.values[min(i + 1, len(self.values) - 1)]


def read_rules(setting, where: str, name: str = "t") -> list[Rule]:
    """mergekit's spelling of a parameter (number, list of numbers, list of {filter, value}) → rules in order."""
    entries = setting if _is_list_of_dicts(setting) else [setting if isinstance(setting, dict) else {"value": setting}]
    rules = []
    for entry in entries:
        value = entry.get("value")
        values = value if isinstance(value, list) else [value]
        try:
            if not values or entry.keys() - {"filter", "value"} or any(isinstance(v, bool) for v in values):
                raise ValueError
            numbers = tuple(float(v) for v in values)
            if not all(abs(v) < float("inf") for v in numbers):
                raise ValueError
        except (TypeError, ValueError):
            raise InputError(f"{where}: {name} = {entry!r} is not a number, list of numbers or list of {{filter, value}}") from None
        pattern = entry.get("filter")
        rules.append(Rule("" if pattern in (None, "*") else str(pattern), numbers))
    return rules


def _is_list_of_dicts(setting) -> bool:
    return isinstance(setting, list) and bool(setting) and all(isinstance(entry, dict) for entry in setting)


def spell(rules: list[Rule]):
    """The rules as mergekit spells them: the inverse of read_rules."""
    value = lambda rule: list(rule.values) if len(rule.values) > 1 else rule.values[0]  # noqa: E731
    if len(rules) == 1 and not rules[0].filter:
        return value(rules[0])
    return [{"filter": rule.filter, "value": value(rule)} if rule.filter else {"value": value(rule)} for rule in rules]


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to, from 0; None for embeddings, final norm and head."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def depths(names) -> dict[str, float]:
    """Depth of every tensor: layer / (layers - 1), 0 outside the layers, 1 in a model of one layer."""
    layers = {name: layer_of(name) for name in names}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    return {name: 0.0 if layer is None else layer / last if last else 1.0 for name, layer in layers.items()}


def evaluate(rules: list[Rule], names, where: str, name: str = "t") -> dict[str, float]:
    """The parameter's value for every tensor. InputError naming a tensor that no rule matches."""
    found = {}
    for tensor, x in depths(names).items():
        rule = next((r for r in rules if r.filter in tensor), None)
        if rule is None:
            raise InputError(f"{where}: gives no {name} for {tensor}; add a last entry without a filter: - value: 0.5")
        found[tensor] = rule.at(x)
    return found

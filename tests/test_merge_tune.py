"""merge.py tune: the three losses against their definitions, the search on known landscapes, the whole command."""

import json
import math
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge
from conftest import write_bins
from merge_pairs import make_pair, run, tensors_of
from nanomed import InputError
from nanomed.hf import check_weights, model_config
from nanomed.merging import losses, tune
from nanomed.merging.tune import Trial, front, rules_of, search
from nanomed.model import Decoder
from nanomed.prompts import end_tokens, read_prompts, render
from nanomed.tokenizer import tokenizer_sha256
from nanomed.weights import load_weights

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["Was pumpt das Herz?", "Was baut die Leber ab?", "Was ist Fieber?", "Was senkt Insulin?"]


@pytest.fixture
def chat_pair(tmp_path, tiny):
    """A pair with a chat template, prompts for it."""
    base, cpt = make_pair(tmp_path, tiny.model, dtype=torch.float32)
    for folder in (base, cpt):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"].fill_(1.0)  # zero in the pair: every logit would be
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    return base, cpt, prompts


def decoder(folder) -> Decoder:
    model = Decoder(model_config(folder))
    load_weights(model, check_weights(model, folder))
    return model.requires_grad_(False)


# --- the losses ----------------------------------------------------------------------------------------------------


def test_bits_per_byte_of_both_halves_is_that_of_the_whole_text(tiny):
    model, digest = decoder(tiny.model), tokenizer_sha256(tiny.model / "tokenizer.json")
    text = losses.Text(str(tiny.val), 384, digest, 16, 10**6, "--domain")
    reference = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    bins = text.stream.bins[0]
    nll = {"search": 0.0, "check": 0.0}
    start = 0
    for doc, n in enumerate(bins.lengths):  # every window cuts the documents, which begin anew in it
        ids = torch.from_numpy(bins.tokens(doc, 0, n).astype(np.int64))
        for a in sorted({0, *range(-start % 16, int(n), 16)}):
            b = min(int(n), (start + a) // 16 * 16 + 16 - start)
            logits = reference(ids[None, a:b]).logits[0].float()
            targets = ids[a + 1 : b + 1]
            loss = (
                torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum").item() if len(targets) else 0.0
            )
            nll[losses.HALVES[(start + a) // 16 % 2]] += loss
        start += int(n)
    found = {half: text.bits_per_byte(model, half, CPU) for half in losses.HALVES}
    labels = dict.fromkeys(losses.HALVES, 0)
    for window in range(text.n_windows):
        batch = losses.pack(text.stream, window, text.shape, text.stop)
        labels[losses.HALVES[window % 2]] += int((batch.labels != losses.IGNORED).sum())
    assert sum(labels.values()) == bins.n_tokens - bins.n_docs
    for half in losses.HALVES:
        expected = nll[half] / math.log(2) / (labels[half] * bins.n_bytes / (bins.n_tokens - bins.n_docs))
        assert found[half] == pytest.approx(expected, rel=1e-4)


def test_the_template_and_the_answers_are_transformers(chat_pair):
    base, _, prompts = chat_pair
    tokenizer, reference = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    messages = read_prompts(prompts).values()
    for message in messages:
        expected = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert render(base, message) == expected
    ids = [tokenizer(render(base, m), add_special_tokens=False).input_ids for m in messages]
    answers = losses.greedy_answers(decoder(base), ids, end_tokens(base), CPU)
    for prompt, answer in zip(ids, answers, strict=True):
        generated = reference.generate(torch.tensor([prompt]), max_new_tokens=losses.ANSWER_TOKENS, do_sample=False)
        assert generated[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("several", [False, True])
def test_a_template_is_told_not_to_think_and_of_several_the_default_one_is_taken(several, chat_pair):
    base, _, prompts = chat_pair
    thinks = TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": thinks}]
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": templates if several else thinks}
    path.write_text(json.dumps(config))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for message in read_prompts(prompts).values():
        expected = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert render(base, message) == expected
        assert expected.endswith("<assistant><think></think>")
    path.write_text(json.dumps(config | {"chat_template": templates[:1]}))
    with pytest.raises(InputError, match="has no chat template"):
        render(base, message)


def test_an_answer_stops_at_its_end(chat_pair):
    base, _, _ = chat_pair
    free = losses.greedy_answers(decoder(base), [[5, 6, 7]], set(), CPU)[0]
    assert len(free) == losses.ANSWER_TOKENS
    stopped = losses.greedy_answers(decoder(base), [[5, 6, 7], [8, 9]], {free[3]}, CPU)[0]
    assert stopped == free[: free.index(free[3]) + 1]


def test_kl_is_zero_at_base_and_the_definitions_elsewhere(chat_pair):
    base, cpt, prompts = chat_pair
    model, other = decoder(base), decoder(cpt)
    chat = losses.Chat(prompts, base, model, CPU)
    assert chat.kl(model, "search") == pytest.approx(0, abs=1e-6)
    ours, theirs = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(cpt)
    total = n_bytes = 0
    for message in list(read_prompts(prompts).values())[1::2]:
        ids = chat.tokenizer.encode(render(base, message), add_special_tokens=False).ids
        (answer,) = losses.greedy_answers(model, [ids], end_tokens(base), CPU)
        p, q = (m(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1) for m in (ours, theirs))
        total += (p.exp() * (p - q)).sum().item()
        n_bytes += len(chat.tokenizer.decode(answer, skip_special_tokens=False).encode())
    assert chat.kl(other, "check") == pytest.approx(total / math.log(2) / n_bytes, rel=1e-4)
    assert total > 0.01


def test_kl_of_many_rows_runs_the_trunk_once(chat_pair, monkeypatch):
    base, cpt, prompts = chat_pair
    chat, other = losses.Chat(prompts, base, decoder(base), CPU), decoder(cpt)
    expected = chat.kl(other, "check")
    batch, rows, log_p, n_bytes = chat.halves["check"]
    chat.halves["check"] = batch, rows.repeat(9), log_p.repeat(9, 1), n_bytes
    calls, hidden = [], other.hidden
    monkeypatch.setattr(other, "hidden", lambda batch: (calls.append(1), hidden(batch))[1])
    assert chat.kl(other, "check") == pytest.approx(9 * expected)
    assert len(calls) == 1


# --- the search ----------------------------------------------------------------------------------------------------


def bowl(target):
    """Σ (t - target)², all of it called domain."""
    return lambda point: Trial(point, sum((t - x) ** 2 for t, x in zip(point, target, strict=True)), 0.0, 0.0)


@pytest.mark.parametrize("target", [(0.3,) * 5, (0.1, 0.9, 0.6, 0.2, 0.5), (0, 1, 1, 0, 1)])
def test_the_search_finds_the_bottom_of_a_bowl(target):
    trials = search(bowl(target), 2, 200, (1, 1, 1))
    best = min(trials, key=lambda t: t.domain)
    assert best.point == pytest.approx(target, abs=1 / 16)
    assert len(trials) == len({t.point for t in trials})


@pytest.mark.parametrize("budget", [5, 7, 12])
def test_the_budget_is_kept_and_the_uniform_ones_come_first(budget):
    trials = search(bowl((0.1, 0.9, 0.6, 0.2, 0.5)), 2, budget, (1, 1, 1))
    assert len(trials) == budget
    assert [t.point[0] for t in trials[:5]] == [0, 0.25, 0.5, 0.75, 1]
    assert all(t.is_uniform() for t in trials[:5])


def test_weights_decide_and_a_point_is_its_rules():
    trial = Trial((0.1, 0.2, 0.3, 0.4, 0.5), 1.0, 10.0, 100.0)
    assert trial.score((1, 0.5, 0.01)) == 7.0
    first, second, rest = rules_of(trial.point)
    assert (first.filter, first.values) == ("self_attn", (0.1, 0.2))
    assert (second.filter, second.values) == ("mlp", (0.3, 0.4))
    assert (rest.filter, rest.values) == ("", (0.5,))


def test_the_front_is_what_no_other_beats():
    points = np.random.default_rng(0).integers(0, 20, (60, 2)).astype(float)
    beaten = lambda p: any((q <= p).all() and (q < p).any() for q in points)  # noqa: E731
    assert {tuple(points[i]) for i in front(points)} == {tuple(p) for p in points if not beaten(p)}


# --- the command ---------------------------------------------------------------------------------------------------


def test_tune_from_end_to_end(chat_pair, tiny, tmp_path, monkeypatch, capsys):
    base, cpt, prompts = chat_pair
    flags = ["tune", base, cpt, tmp_path / "tuned", "--domain", tiny.val, "--general", tiny.val, "--chat", prompts]
    run(monkeypatch, *flags, "--budget", "9", "--seq-len", "64", "--set-tokens", "600", "--knots", "2")
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("BASE", "CPT", "chosen", "--t-file"))
    record = json.loads((tmp_path / "tuned" / "trials.json").read_text())
    assert len(record["trials"]) == 9
    best = min(record["trials"], key=lambda t: t["domain"] + t["general"] + t["chat"])
    written = yaml.safe_load((tmp_path / "tuned" / "t.yaml").read_text())
    assert written == {"t": merge.mergekit_yaml.spell(rules_of(tuple(best["point"])))}
    ElementTree.parse(tmp_path / "tuned" / "pareto.svg")
    run(monkeypatch, base, cpt, tmp_path / "merged", "--t-file", tmp_path / "tuned" / "t.yaml")
    resident = tune.Resident(open_(base), open_(cpt), CPU)  # what was measured is what is written
    resident.set(rules_of(tuple(best["point"])))
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert torch.allclose(dict(resident.model.named_parameters())[name], tensor, rtol=1e-5, atol=1e-7), name


def open_(folder):
    from nanomed.merging.source import open_checkpoint

    return open_checkpoint(str(folder), "BASE")


def test_bad_input(chat_pair, tiny, tmp_path, monkeypatch):
    base, cpt, prompts = chat_pair
    flags = ["tune", base, cpt, tmp_path / "tuned", "--domain", tiny.val, "--general", tiny.val]

    def refused(chat, *more, named: str) -> None:
        with pytest.raises(SystemExit) as exit_:
            run(monkeypatch, *flags, "--seq-len", "64", "--chat", chat, *more)
        assert named in str(exit_.value.code)
        assert "\n" not in str(exit_.value.code)
        assert not (tmp_path / "tuned").exists()

    refused(tmp_path / "nowhere.jsonl", named="nowhere.jsonl")
    for text, named in (
        ("{}\n{}", "line 1"),
        ('{"prompt": "a"}\nb', "line 2"),
        ('{"prompt": "a"}', "two prompts"),
        ('["a"]', "line 1"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        refused(tmp_path / "bad.jsonl", named=named)
    refused(prompts, "--set-tokens", "60", named="tokens (--set-tokens 60) are less than two windows")
    write_bins(tmp_path / "other", [[1, 2, 3]] * 9, 320)
    flags[5] = tmp_path / "other"
    refused(prompts, named="another tokenizer")
    flags[5] = tiny.val
    for folder in (base, cpt):  # no head, though config.json does not tie it
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(prompts, named="tensor lm_head.weight is missing")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ raise_exception('no system') }}"}))
    with pytest.raises(InputError, match="no system"):
        render(base, [{"role": "user", "content": "a"}])
    assert sys.argv[1] == "tune"

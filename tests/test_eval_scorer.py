"""The scorer against lm-eval's own `hf` model, and against itself at other batch sizes."""

import json
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from conftest import SENTENCES, save_reference
from nanomed import InputError
from nanomed.evaluation.inference import continuation, greedy
from nanomed.evaluation.loading import load_decoder
from nanomed.evaluation.scorer import DecoderLM
from nanomed.evaluation.sharing import Question, common, groups, shared

CPU = torch.device("cpu")
TINY = dict(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": MistralConfig(**TINY, head_dim=16, sliding_window=48),
    "qwen2": Qwen2Config(**TINY, use_sliding_window=False),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
}


def write_tokenizer(folder, bos: bool):
    """A byte-level BPE tokenizer; bos: its post-processor puts <s> before every text, as Mistral's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=370, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([*SENTENCES, "Frage: Antwort: A B C D"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Kind of model → (ours, lm-eval's hf), on the same random float32 weights."""
    found = {}
    for kind, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = save_reference(config, folder)
        write_tokenizer(folder, bos=kind == "mistral")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=512)
        found[kind] = DecoderLM(load_decoder(folder, torch.float32, CPU), folder, 256), peer
    return found


def question(rng: random.Random, answer: str = "") -> str:
    return f"Frage: {' '.join(rng.choices(SENTENCES, k=rng.randint(1, 3)))}\nAntwort:{answer}"


def prompts(n_shots: int, options: list[str], n: int = 7) -> list[tuple[str, str]]:
    """(context, continuation) of n questions after the same shots."""
    rng = random.Random(n_shots)
    shots = "".join(question(rng, rng.choice(options)) + "\n\n" for _ in range(n_shots))
    return [(shots + q, option) for q in [question(rng) for _ in range(n)] for option in options]


LETTERS = [" A", " B", " C", " D"]
TEXTS = [" Das Herz.", " Das Herz pumpt Blut.", " Insulin", " Das"]
CASES = {
    "0 shots, letters": prompts(0, LETTERS),
    "3 shots, letters": prompts(3, LETTERS),
    "3 shots, whole answers": prompts(3, TEXTS),
    "two tasks and texts without context": prompts(2, LETTERS) + prompts(3, TEXTS, 2) + [("", t) for t in TEXTS],
    "text that begins with BOS": [("<s>" + c, o) for c, o in prompts(0, LETTERS, 2)],
    "space before the answer": [(c + " ", o[1:]) for c, o in prompts(1, LETTERS, 3)],
}


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_same_log_probabilities_as_the_hf_model(sides, kind, case):
    ours, peer = sides[kind]
    requests = instances("loglikelihood", CASES[case])
    mine, theirs = ours.loglikelihood(requests), peer.loglikelihood(requests, disable_tqdm=True)
    assert mine == [(pytest.approx(p, abs=1e-4), greedy) for p, greedy in theirs]
    assert len({round(p, 3) for p, _ in mine}) > 3  # they do differ: a constant would agree with itself


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_batch_size_gives_the_same(sides, kind):
    ours, _ = sides[kind]
    requests = instances("loglikelihood", [pair for pairs in CASES.values() for pair in pairs])
    whole = ours.loglikelihood(requests)
    one_by_one = [ours.loglikelihood([request])[0] for request in requests]
    assert [p for p, _ in one_by_one] == pytest.approx([p for p, _ in whole], abs=1e-5)
    for batch_tokens in (1, 97, 100_000):
        other = DecoderLM(ours.model, ours.folder, batch_tokens).loglikelihood(requests)
        assert [p for p, _ in other] == pytest.approx([p for p, _ in whole], abs=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_generating_as_the_hf_model(sides, kind):
    ours, peer = sides[kind]
    asked = [(SENTENCES[i], {"until": ["\n\n"], "max_gen_toks": 12}) for i in range(2)]
    mine = ours.generate_until(instances("generate_until", asked))
    assert mine == peer.generate_until(instances("generate_until", asked), disable_tqdm=True)
    whole = mine[0]
    stop = {"until": [whole[3:5]], "max_gen_toks": 12}
    assert ours.generate_until(instances("generate_until", [(SENTENCES[0], stop)])) == [whole[: whole.index(whole[3:5])]]


def test_a_text_without_context_begins_with_the_tokenizer_s_end_token_if_it_has_no_bos(sides, tmp_path):
    """As Qwen's instruct models: of two end tokens the tokenizer's is not the smallest."""
    ours, peer = sides["qwen2"]
    write_tokenizer(tmp_path, bos=False)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "bos_token"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    other = HFLM(pretrained=peer.model, tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path), max_length=512)
    requests = instances("loglikelihood", [("", text) for text in TEXTS])
    found = DecoderLM(ours.model, tmp_path, 256).loglikelihood(requests)
    assert found == [(pytest.approx(p, abs=1e-4), greedy) for p, greedy in other.loglikelihood(requests, disable_tqdm=True)]
    assert found != ours.loglikelihood(requests)


def test_a_prompt_to_answer_loses_its_beginning_and_is_counted(sides):
    ours, peer = sides["llama"]
    texts = [" ".join(SENTENCES * k) for k in (1, 14)]
    asked = instances("generate_until", [(text, {"until": ["\n\n"], "max_gen_toks": 12}) for text in texts])
    lm = DecoderLM(ours.model, ours.folder, 256)
    assert lm.generate_until(asked) == peer.generate_until(asked, disable_tqdm=True)
    assert lm.cut == {texts[1]}
    for n_tokens in (512, 600):  # nothing of the prompt would be left
        with pytest.raises(InputError, match=f"answers of {n_tokens} tokens, but the model's context has 512"):
            lm.generate_until(instances("generate_until", [(SENTENCES[0], {"max_gen_toks": n_tokens})]))


def test_questions_that_begin_alike_are_found():
    rng = random.Random(0)
    shots = [[rng.randrange(100) for _ in range(60)] for _ in range(2)]
    contexts = [[t, *shots[t], *(rng.randrange(100) for _ in range(9))] for t in (0, 1) for _ in range(5)]
    contexts += [[7, *(rng.randrange(100) for _ in range(8))] for _ in range(3)]
    rng.shuffle(contexts)
    found = list(groups([Question(c, [[1]], [[0]]) for c in contexts]))
    assert sorted(c for g in found for q in g for c in [q.context]) == sorted(contexts)
    assert [(len(g), shared(g)) for g in found] == [(5, 61), (5, 61), (3, 0)]
    assert common([1, 2, 3], [1, 2]) == 2


def test_a_long_prompt_loses_its_first_shots(sides):
    ours, _ = sides["llama"]
    short = DecoderLM(ours.model, ours.folder, 256)
    shots, last = "".join(question(random.Random(i), " A") + "\n\n" for i in range(4)), question(random.Random(9))
    fits = shots[shots.index("\n\n") + 2 :] + last
    short.max_length = len(ours.encode([fits])[fits]) + 2
    both = lambda context: instances("loglikelihood", [(context, " A"), (context, " B")])  # noqa: E731
    assert short.loglikelihood(both(shots + last)) == short.loglikelihood(both(fits))
    assert short.cut == {shots + last}
    short.chat = True
    with pytest.raises(InputError, match="fewer --shots"):
        short.loglikelihood(both(shots + last))


def test_a_question_too_long_by_itself_loses_its_beginning(sides):
    ours, peer = sides["llama"]
    asked = instances("loglikelihood", [(" ".join(SENTENCES * 14), " Das Herz")])
    [(found, greedy)] = ours.loglikelihood(asked)
    assert [(pytest.approx(found, abs=1e-4), greedy)] == peer.loglikelihood(asked, disable_tqdm=True)


def test_an_answer_stops_at_an_end_token(sides):
    ours, _ = sides["llama"]
    asked = instances("generate_until", [(SENTENCES[0], {"max_gen_toks": 3})])
    assert ours.generate_until(asked) != [""]
    short = DecoderLM(ours.model, ours.folder, 256)
    short.ends = set(range(384))
    assert short.generate_until(asked) == [""]


OPTIONS = [
    {"max_gen_toks": 5}, {"max_new_tokens": 6}, {"max_tokens": 7}, {"max_completion_tokens": 8}, {"max_gen_toks": "9"},
    {"max_gen_toks": 4, "max_new_tokens": 9}, {"do_sample": False, "temperature": 0.7, "max_gen_toks": 4},
    {"temperature": 0, "max_gen_toks": 4}, {"until": [""], "max_gen_toks": 12}, {"until": ["", "\n"], "max_gen_toks": 12},
    {"until": "\n", "max_gen_toks": 12}, {"until": ["</s>"], "max_gen_toks": 12}, {"num_beams": 1, "max_gen_toks": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_task_s_options_mean_what_they_mean_to_lm_eval(sides, options):
    ours, peer = sides["mistral"]
    requests = instances("generate_until", [(SENTENCES[0], options)])
    [mine] = ours.generate_until(requests)
    assert [mine] == peer.generate_until(requests, disable_tqdm=True)
    assert mine


def answered(ours, n_tokens: int) -> list[int]:
    """The model's first tokens after a sentence, whatever would end the answer."""
    ids = ours.encode(SENTENCES[:1])[SENTENCES[0]]
    return list(continuation(ours.model, ours.folder, ids, n_tokens, (), greedy))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_an_answer_ends_where_any_of_the_files_says(sides, tmp_path, file):
    ours, _ = sides["mistral"]
    asked = instances("generate_until", [(SENTENCES[0], {"max_gen_toks": 12})])
    ids = answered(ours, 12)
    name = ours.tokenizer.id_to_token(ids[2])
    write_tokenizer(tmp_path, bos=True)
    for other in ("generation_config.json", "config.json", "tokenizer_config.json"):
        known = json.loads((tmp_path / other).read_text()) if (tmp_path / other).exists() else {}
        entry = {"eos_token": name} if other == file else {"eos_token": "</s>"}
        if other != "tokenizer_config.json":
            entry = {"eos_token_id": [1, ids[2]] if other == file else 1}
        (tmp_path / other).write_text(json.dumps(known | entry))
    [short] = DecoderLM(ours.model, tmp_path, 256).generate_until(asked)
    assert short == ours.tokenizer.decode(ids[: ids.index(ids[2])])


def test_a_stop_string_may_be_a_special_token(sides, tmp_path):
    """Which the text of an answer does not show."""
    ours, peer = sides["mistral"]
    ids = answered(ours, 12)
    write_tokenizer(tmp_path, bos=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    name = ours.tokenizer.id_to_token(ids[2])
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": ids[2], "content": name} | flags)
    path.write_text(json.dumps(content))
    other = HFLM(pretrained=peer.model, tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path), max_length=512)
    asked = instances("generate_until", [(SENTENCES[0], {"until": [name], "max_gen_toks": 12})])
    [short] = DecoderLM(ours.model, tmp_path, 256).generate_until(asked)
    assert [short] == other.generate_until(asked, disable_tqdm=True)
    assert len(short) < len(ours.tokenizer.decode(ids))


def test_what_the_scorer_does_not_do_is_refused(sides):
    ours, _ = sides["llama"]
    for options in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}, {"repetition_penalty": 1.1}):
        with pytest.raises(InputError, match="greed"):
            ours.generate_until(instances("generate_until", [("Frage", options)]))
    with pytest.raises(InputError, match="perplexity"):
        ours.loglikelihood_rolling(instances("loglikelihood_rolling", [("Frage",)]))
    with pytest.raises(InputError, match="to score"):
        ours.loglikelihood(instances("loglikelihood", [("Frage", "")]))


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_conversations_are_lm_eval_s(sides, tmp_path):
    """With a system message that the template refuses, and with the answer's beginning."""
    ours, peer = sides["llama"]
    write_tokenizer(tmp_path, bos=False)
    (tmp_path / "chat_template.jinja").write_text(STRICT)
    lm = DecoderLM(ours.model, tmp_path, 256)
    other = HFLM(pretrained=peer.model, tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path), max_length=512)
    system, user = {"role": "system", "content": "Kurz."}, {"role": "user", "content": "Was ist das?"}
    begun = {"role": "assistant", "content": "Das ist"}
    for history, prompt in (([user], True), ([system, user], True), ([user, begun], False), ([system, user, begun], False)):
        assert lm.apply_chat_template(history, prompt) == other.apply_chat_template(history, prompt)
    assert lm.apply_chat_template([user, begun], False) == "<user>Was ist das?</s><assistant>Das ist"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(InputError, match="never"):
        lm.apply_chat_template([system, user])


def test_a_model_without_chat_template_or_tokenizer_is_refused(sides, tmp_path):
    ours, _ = sides["llama"]
    with pytest.raises(InputError, match="has no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "Hallo"}])
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        DecoderLM(ours.model, tmp_path, 256)

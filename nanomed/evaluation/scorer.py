"""lm-eval's view of a nanomed decoder: `DecoderLM` is an `lm_eval.api.model.LM`.

lm-eval's own `hf` model runs every question with its whole few-shot prompt, and computes the whole vocabulary at every
position. Here questions with a common beginning are found from their tokens, whatever the task: the beginning is computed
once (nanomed.evaluation.inference), the options of a question share its tokens, and lm_head runs only where a token is
scored. The same log-probabilities, for about the cost of the questions alone.

Text becomes tokens as in lm-eval: BOS where the tokenizer's own post-processor puts one, and never twice.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from nanomed import InputError
from nanomed.evaluation.inference import KV, PREFIX_CHUNK, check_finite, continuation, extend, greedy, hidden, pack, scores
from nanomed.evaluation.loading import load_tokenizer
from nanomed.evaluation.sharing import Question, groups, shared
from nanomed.model import Decoder
from nanomed.prompts import end_tokens, template_renderer
from nanomed.tokenizer import token_content, tokenizer_config

SHOT_BORDER = "\n\n"  # lm-eval's default between shots


class DecoderLM(LM):
    """A decoder behind lm-eval's interface; greedy where it generates."""

    def __init__(self, model: Decoder, folder: Path, batch_tokens: int):
        """folder: with tokenizer.json and the chat template. batch_tokens: of the largest pass, padding included."""
        super().__init__()
        self.model, self.folder, self.batch_tokens = model, folder, batch_tokens
        self.tokenizer = load_tokenizer(folder)
        self._device = model.lm_head.weight.device
        self.max_length = model.config.max_position_embeddings or 2048
        self.ends = end_tokens(folder)
        self.prefix_token = self._prefix_token()
        self.cut: set[str] = set()  # prompts that lost their beginning because they did not fit the context
        self.chat = False  # set by apply_chat_template
        self.begun = False  # the first pass is one question, so that a broken model fails at once

    def _prefix_token(self) -> int:
        """The token before a text without context, as in lm-eval: the tokenizer's BOS, or its end token if it has no BOS. (A
        model may have further end tokens: Qwen's instruct models have two.)"""
        config = tokenizer_config(self.folder)
        token = token_content(config, "bos_token") or token_content(config, "eos_token")
        found = self.tokenizer.token_to_id(token) if token else None
        return found if found is not None else min(self.ends, default=0)

    # --- text to tokens --------------------------------------------------------------------------------------------

    def encode(self, texts: Iterable[str], special: bool = True) -> dict[str, list[int]]:
        """Tokens of every text. special: let the tokenizer add BOS, except before a text that begins with it."""
        bos = self.tokenizer.decode([self.prefix_token], skip_special_tokens=False)
        found = {}
        for add in (True, False):
            chosen = [text for text in dict.fromkeys(texts) if (special and not text.startswith(bos)) == add]
            encoded = self.tokenizer.encode_batch_fast(chosen, add_special_tokens=add)
            found |= {text: e.ids for text, e in zip(chosen, encoded, strict=True)}
        return found

    def _questions(self, pairs: list[tuple[str, str]]) -> list[Question]:
        """(context, continuation) of every request → questions, the requests of one context together."""
        # Trailing spaces move to the continuation: " A" is a token that models know, a space before "A" is not.
        pairs = [(c.rstrip(), c[len(c.rstrip()) :] + then) for c, then in pairs]
        by_context: dict[str, dict[str, list[int]]] = {}
        for number, (context, then) in enumerate(pairs):
            by_context.setdefault(context, {}).setdefault(then, []).append(number)
        ids = self.encode([*by_context, *(context + then for context, then in pairs)])
        alone = self.encode([then for context, then in pairs if not context], special=False)
        questions = []
        for context, thens in by_context.items():
            if context:
                first, rest = self._fit(context, list(thens), ids)
            else:
                first, rest = [self.prefix_token], [alone[then] for then in thens]
                rest = [r[1:] if r[0] == self.prefix_token and len(r) > 1 else r for r in rest]
            questions.append(Question(first, rest, list(thens.values())))
        return questions

    def _fit(self, context: str, thens: list[str], ids: dict[str, list[int]]) -> tuple[list[int], list[list[int]]]:
        """Tokens of the context and of its continuations; the context loses its first shots until it fits the model."""
        whole, at = context, 0
        while True:
            first = ids[context]
            rest = [ids[context + then][len(first) :] for then in thens]
            if not all(rest):
                raise InputError(
                    f"{self.folder}: its tokenizer merges {thens[0]!r} into the text before it; nothing is left to score"
                )
            keep = self.max_length + 1 - max(map(len, rest))
            if len(first) <= keep:
                return first, rest
            if self.chat or keep < 1:
                raise InputError(
                    f"a prompt of {len(first)} tokens does not fit the model's {self.max_length} and cannot be cut"
                    f"{' inside its chat template' if self.chat else ''}; use fewer --shots"
                )
            self.cut.add(whole)
            at = whole.find(SHOT_BORDER, at) + len(SHOT_BORDER)
            if at < len(SHOT_BORDER):  # no shot left: the question alone is too long
                return first[-keep:], rest
            context = whole[at:]
            ids = self.encode([context, *(context + then for then in thens)])

    # --- scoring ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For every request's (context, continuation): ln p(continuation | context), and whether greedy decoding yields it."""
        pairs = [request.args for request in requests]
        found: list = [None] * len(pairs)
        questions = self._questions(pairs)
        with tqdm(total=len(questions), desc="questions", delay=2, leave=False, disable=disable_tqdm) as bar:
            for group in groups(questions):
                for question, results in self._score(group):
                    for numbers, result in zip(question.wanted, results, strict=True):
                        for number in numbers:
                            found[number] = result
                            self.cache_hook.add_partial("loglikelihood", pairs[number], result)
                    bar.update()
        return found

    def _score(self, group: list[Question]) -> Iterator[tuple[Question, list[tuple[float, bool]]]]:
        """All continuations of questions with a common beginning."""
        n_prefix = shared(group)
        if len(group) == 1 and n_prefix < PREFIX_CHUNK:
            n_prefix = 0
        prefix: KV = extend(self.model, [], 0, group[0].context[:n_prefix])[1] if n_prefix else []
        group = sorted(group, key=lambda q: -q.row(n_prefix).n_tokens)
        while group:
            longest = group[0].row(n_prefix).n_tokens
            # The prefix stands before every row of the padded keys, so rows are few where it is long.
            n = max(1, min(self.batch_tokens // longest, 16 * self.batch_tokens // (n_prefix + longest))) if self.begun else 1
            self.begun = True
            batch, group = group[:n], group[n:]
            yield from zip(batch, self._score_batch(batch, n_prefix, prefix), strict=True)

    def _score_batch(self, batch: list[Question], n_prefix: int, prefix: KV) -> list[list[tuple[float, bool]]]:
        """One pass: (sum of log-probabilities, all greedy) of every continuation of every question."""
        rows = [question.row(n_prefix) for question in batch]
        states, _ = hidden(self.model, pack(rows, n_prefix, self._device), prefix)
        at, targets, start = [], [], 0
        for question, row in zip(batch, rows, strict=True):
            last = start + len(row.trunk) - 1
            start = last + 1
            for tokens in question.continuations:
                at += [last, *range(start, start + len(tokens) - 1)]
                targets += tokens
                start += len(tokens) - 1
        index = torch.tensor(at, device=self._device)
        log_p, likeliest = scores(self.model, states[index], torch.tensor(targets, device=self._device))
        check_finite(log_p, self.folder)
        lengths = [len(tokens) for question in batch for tokens in question.continuations]
        parts = zip(log_p.double().cpu().split(lengths), likeliest.cpu().split(lengths), strict=True)
        results = iter([(float(p.sum()), bool(g.all())) for p, g in parts])
        return [[next(results) for _ in question.continuations] for question in batch]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """lm-eval's perplexity tasks: their figures are not right or wrong, so `knowledge` has no place for them. InputError."""
        raise InputError("a task of perplexity is not supported; run it with lm-eval itself")

    # --- generating ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The likeliest next token again and again, up to a stop string, an end token or the task's limit of tokens."""
        found = []
        for request in tqdm(requests, "answers", delay=2, leave=False, disable=disable_tqdm):
            context, options = request.args
            found.append(self._generate(context, *stops(options)))
        return found

    def _generate(self, context: str, until: list[str], n_tokens: int) -> str:
        """The answer to one context, which loses its beginning if it and n_tokens do not fit. InputError if nothing would stay."""
        tokens, room = self.encode([context])[context], self.max_length - n_tokens
        if room < 1:
            raise InputError(f"a task asks for answers of {n_tokens} tokens, but the model's context has {self.max_length}")
        if len(tokens) > room:
            self.cut.add(context.rstrip())
        tokens = tokens[-room:] or [self.prefix_token]
        answer, text = [], ""
        for token in continuation(self.model, self.folder, tokens, n_tokens, self.ends, greedy):
            answer.append(token)
            text = self.tokenizer.decode(answer)
            whole = self.tokenizer.decode(answer, skip_special_tokens=False)  # a stop string may be a special token
            if any(stop in whole for stop in until):  # an empty one ends it at once, as in lm-eval's hf model
                break
        return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]

    # --- chat template ---------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation by the model's template; without add_generation_prompt its last message is the answer's beginning.

        As in lm-eval, a template that knows no system message is given the conversation without it. InputError if there is no
        template, or it rejects the conversation.
        """
        self.chat = True
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        to_text = template_renderer(self.folder, enable_thinking=False, **how)
        try:
            return to_text(chat_history)
        except ValueError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise InputError(f"{self.folder}: {error}") from None
        return self.apply_chat_template(rest, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For lm-eval's records."""
        return "tokenizer's own" if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.folder)


PLAIN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}  # cannot change a greedy answer


def stops(options: dict) -> tuple[list[str], int]:
    """(stop strings, limit of tokens) of a task's generation_kwargs, as lm-eval normalises them.

    InputError for an option that plain greedy decoding would ignore.
    """
    options = normalize_gen_kwargs(options)
    if options["do_sample"]:
        raise InputError("a task with sampled answers is not supported; decoding is greedy here")
    if options.get("num_beams", 1) == 1:
        options.pop("num_beams", None)
    if unknown := sorted(set(options) - PLAIN):
        raise InputError(f"a task asks for {', '.join(unknown)}, which is not supported; decoding is greedy here")
    return [stop for stop in options["until"] if stop is not None], options["max_gen_toks"]

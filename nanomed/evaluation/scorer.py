"""lm-eval's view of a nanomed decoder: `DecoderLM` is an `lm_eval.api.model.LM`.

lm-eval's own `hf` model runs every question with its whole few-shot prompt, and the whole vocabulary at every position.
Here the questions that begin alike are found from their tokens, whatever the task: what they share is computed once
(nanomed.evaluation.inference), the options of a question share its tokens, and lm_head runs only where a token is
scored. The same log-probabilities, for about the cost of the questions alone.

Text becomes tokens as in lm-eval: BOS where the tokenizer's own post-processor puts one, and never twice.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lm_eval.api.model import LM
from tokenizers import Tokenizer
from tqdm import tqdm

from nanomed import InputError
from nanomed.evaluation.inference import KV, PREFIX_CHUNK, extend, hidden, pack, scores
from nanomed.evaluation.sharing import Question, groups, shared
from nanomed.hf import check_weights, model_config
from nanomed.model import Decoder
from nanomed.prompts import end_tokens, render
from nanomed.shards import open_safetensors
from nanomed.tokenizer import token_content, tokenizer_config

SHOT_BORDER = "\n\n"  # lm-eval's default between shots


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The checkpoint in FOLDER, its products in dtype. InputError where weights are missing or misshapen.

    On a CPU the weights stay in the file, mapped into memory, in its own dtype; a layer's are cast as it runs. bfloat16 is
    exact in float32, so nothing is lost, and half the memory and all of the loading time are saved.
    """
    with torch.device("meta"):
        model = Decoder(model_config(folder), dtype)
    files = check_weights(model, folder)
    handles = {file: open_safetensors(file) for file in set(files.values())}
    to: dict = {} if device.type == "cpu" else {"device": device, "dtype": dtype}
    weights = {name: handles[file].get_tensor(name).to(**to) for name, file in files.items()}
    model.load_state_dict(weights, assign=True, strict=False)  # a tied lm_head has no tensor of its own
    model._tie()
    return model.eval().requires_grad_(False)


class DecoderLM(LM):
    """A decoder behind lm-eval's interface; greedy where it generates."""

    def __init__(self, model: Decoder, folder: Path, batch_tokens: int):
        """folder: with tokenizer.json and the chat template. batch_tokens: of the largest pass, padding included."""
        super().__init__()
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: has no tokenizer.json; evaluation needs the model's tokenizer beside it")
        self.model, self.folder, self.batch_tokens = model, folder, batch_tokens
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._device = model.lm_head.weight.device
        self.max_length = model.config.max_position_embeddings or 2048
        self.ends = end_tokens(folder)
        self.prefix_token = self._prefix_token()
        self.cut: set[str] = set()  # prompts that lost shots because they did not fit the context
        self.chat = False  # set by apply_chat_template
        self.begun = False  # the first pass is one question: what is wrong with a model shows at once

    def _prefix_token(self) -> int:
        """What stands before a text without context: BOS, or the end token where the tokenizer has none."""
        bos = token_content(tokenizer_config(self.folder), "bos_token")
        token = self.tokenizer.token_to_id(bos) if bos else None
        return token if token is not None else min(self.ends, default=0)

    # --- text to tokens --------------------------------------------------------------------------------------------

    def encode(self, texts: Iterable[str], special: bool = True) -> dict[str, list[int]]:
        """Tokens of every text. special: let the tokenizer add BOS, except before a text that begins with it."""
        bos = self.tokenizer.decode([self.prefix_token], skip_special_tokens=False)
        found = {}
        for add in (True, False):
            mine = [text for text in dict.fromkeys(texts) if (special and not text.startswith(bos)) == add]
            encoded = self.tokenizer.encode_batch_fast(mine, add_special_tokens=add)
            found |= {text: e.ids for text, e in zip(mine, encoded, strict=True)}
        return found

    def _questions(self, pairs: list[tuple[str, str]]) -> list[Question]:
        """(context, continuation) of every request → questions, the requests of one context together."""
        # Blanks move to the continuation: " A" is a token that models know, a blank before "A" is not.
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
        """Tokens of the context and of what follows it; the context loses its first shots until it fits the model."""
        whole, at = context, 0
        while True:
            first = ids[context]
            rest = [ids[context + then][len(first) :] for then in thens]
            if not all(rest):
                raise InputError(
                    f"{self.folder}: its tokenizer joins {thens[0]!r} with the text before it; nothing to score"
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
            if at < len(SHOT_BORDER):  # no border left: the question alone is too long
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
        """All continuations of questions that begin alike."""
        n_prefix = shared(group)
        if len(group) == 1 and n_prefix < PREFIX_CHUNK:
            n_prefix = 0
        prefix: KV = extend(self.model, [], 0, group[0].context[:n_prefix])[1] if n_prefix else []
        group = sorted(group, key=lambda q: -q.row(n_prefix).n_tokens)
        while group:
            longest = group[0].row(n_prefix).n_tokens
            # The prefix stands before every row of the padded keys, so rows are few where it is long.
            n = (
                max(1, min(self.batch_tokens // longest, 16 * self.batch_tokens // (n_prefix + longest)))
                if self.begun
                else 1
            )
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
        log_p, greedy = scores(self.model, states[index], torch.tensor(targets, device=self._device))
        lengths = [len(tokens) for question in batch for tokens in question.continuations]
        parts = zip(log_p.double().cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
        results = iter([(float(p.sum()), bool(g.all())) for p, g in parts])
        return [[next(results) for _ in question.continuations] for question in batch]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """ln p of every whole text, each token after up to max_length tokens before it, as lm-eval cuts its windows."""
        found = []
        for request in tqdm(requests, "texts", delay=2, leave=False, disable=disable_tqdm):
            (text,) = request.args
            tokens, total = [self.prefix_token, *self.encode([text])[text]], 0.0
            done = 1  # the prefix token is given
            while done < len(tokens):
                stop = min(done + self.max_length, len(tokens))
                first = max(0, stop - 1 - self.max_length)
                states, _ = extend(self.model, [], 0, tokens[first : stop - 1])
                targets = torch.tensor(tokens[done:stop], device=self._device)
                total += float(scores(self.model, states[done - 1 - first :], targets)[0].double().sum())
                done = stop
            found.append(total)
        return found

    # --- generating ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The likeliest next token again and again, up to a stop string, an end token or max_gen_toks (256)."""
        found = []
        for request in tqdm(requests, "answers", delay=2, leave=False, disable=disable_tqdm):
            context, options = request.args
            if options.get("do_sample") or options.get("temperature"):
                raise InputError("a task that samples its answers is not supported; this model decodes greedily")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            found.append(self._generate(context, until, options.get("max_gen_toks", 256)))
        return found

    def _generate(self, context: str, until: list[str], n_tokens: int) -> str:
        tokens = self.encode([context])[context][-(self.max_length - n_tokens) :] or [self.prefix_token]
        states, prefix = extend(self.model, [], 0, tokens)
        answer: list[int] = []
        while len(answer) < n_tokens:
            token = int(self.model.logits(states[-1:]).argmax())
            if token in self.ends:
                break
            answer.append(token)
            text = self.tokenizer.decode(answer)
            if any(stop in text for stop in until):
                break
            states, prefix = extend(self.model, prefix, len(tokens) + len(answer) - 1, [token])
        text = self.tokenizer.decode(answer)
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]

    # --- chat template ---------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model was taught to read it. InputError where it has no template."""
        if not add_generation_prompt:
            raise InputError("--chat: a task that begins the model's answer (gen_prefix) is not supported")
        self.chat = True
        return render(self.folder, chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For lm-eval's records."""
        return "tokenizer's own" if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.folder)

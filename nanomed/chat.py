"""Chat: many requests to an OpenAI-compatible endpoint, at once, and each paid for once.

    for key, answer in ask(requests, url, cache=Path("labels.answers.sqlite"), n_requests=260_000):

A request is (key, body): the key is the caller's, the body goes to `POST URL/chat/completions` (`model`, `messages`,
`temperature`, ...; `vllm serve`, `transformers serve`, llama.cpp and the vendors all speak it). Answers come in order of
completion. Requests are taken from the iterable as there is room, so memory does not grow with their number.

Every answer is committed to the cache, an SQLite file keyed by the SHA-256 of the body, before the caller sees it: after
kill -9 the same command pays only for what was in flight. A body that comes twice in a run is asked once. The key has
no URL in it: another port is the same model; a model that changes must change its name.

What may pass is tried again, waiting 1, 2, 4, ... 60 s or what Retry-After says: no connection, a time-out, 408, 409, 429,
5xx, a body that is cut or no chat completion. A rate limit (429, 503) pauses all requests and halves how many are in flight
(nanomed.pacing). The run gives up only when nothing has been answered for PATIENCE_S, and at once for most other statuses
(a wrong key, an unknown model) and where nobody has listened yet: it ends with one line; what is in flight is waited for and
kept first. A request that failed `tries` times while others were answered is one failure of its own: it gets an Answer without
words, which is not kept, so that another run tries it again.

400, 403, 413 and 422 are said of one request: its words are filtered, or it is too long. It gets an Answer without words,
kept like any other, whose finish_reason is what the endpoint said. But some endpoints also say 400 to a wrong model or
setting, that is to everything: so nothing is believed before another request of the run has been answered, and 20 refusals
with none answered end the run.

Keys and passwords are taken out of whatever the endpoint says, before it is shown or kept.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from nanomed import InputError, first_line
from nanomed.answer_cache import Answer, Cache, request_hash
from nanomed.pacing import Pace
from nanomed.redaction import redact

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
PATIENCE_S = 300.0  # without a single answer: then the endpoint is given up
RETRIED = (408, 409, 429)  # and 5xx
RATE_LIMITS = (429, 503)
REFUSED = (400, 403, 413, 422)  # this request, and maybe every other
FIXED = "fix this and run again; what is answered is kept"
RESERVED = ("model", "messages", "stream", "n")  # of a body: not for --body
N_REFUSED = 20  # with none answered: then it is every other


def parse_body(text: str | None) -> dict:
    """--body: a JSON object with fields to add to every request, or to remove where they are null. InputError if it is none."""
    try:
        extra = json.loads(text or "{}")
    except ValueError as error:
        raise InputError(f"--body {text}: not valid JSON ({error})") from None
    if not isinstance(extra, dict):
        raise InputError(f'--body {text}: expected a JSON object, such as \'{{"max_tokens": null, "max_completion_tokens": 16}}\'')
    if reserved := sorted(extra.keys() & set(RESERVED)):
        raise InputError(f"--body: {reserved[0]} is set by the command and cannot be changed")
    return extra


def with_extra(body: dict, extra: dict) -> dict:
    """The body with the fields of --body: null removes one."""
    return {key: value for key, value in (body | extra).items() if value is not None}


def ask(
    requests: Iterable[tuple[object, dict]],
    url: str,
    cache: Path,
    n_requests: int | None = None,
    concurrency: int = 64,
    timeout_s: float = 120.0,
    tries: int = 8,
    desc: str = "ask",
) -> Iterator[tuple[object, Answer]]:
    """(key, Answer) of every request, in order of completion, under a progress bar.

    url: the endpoint's base, with its /v1. n_requests: for the bar. concurrency: requests in flight, at most. timeout_s: of
    one try, from sending to the last byte. tries: of one request, while others are answered. The API key, where one is
    needed, is OPENAI_API_KEY's. InputError: see above.
    """
    store = Cache(cache)
    try:
        with (
            asyncio.Runner() as runner,
            tqdm(total=n_requests, desc=desc, unit="answer", smoothing=0, disable=None) as bar,
        ):
            endpoint = Endpoint(url, timeout_s, tries, concurrency)
            try:
                for key, answer in _answers(requests, endpoint, store, runner, concurrency):
                    bar.set_postfix_str(f"{endpoint.n_paid:,} new, {endpoint.n_retries:,} tried again", refresh=False)
                    bar.update()
                    yield key, answer
            finally:
                runner.run(endpoint.client.close())
    finally:
        store.close()


def _answers(requests, endpoint: "Endpoint", store: Cache, runner, concurrency: int) -> Iterator[tuple[object, Answer]]:
    """The loop of `ask`: fill up to `concurrency`, wait for the first that are done, keep and hand on their answers."""
    tasks: dict[asyncio.Task, str] = {}  # → hash of its request
    keys: dict[str, list] = {}  # hash of a request in flight → the keys that want its answer
    refused: dict[str, Refused] = {}  # hash of a request → why; until it is known whether every request is
    requests, more, answered = iter(requests), True, False
    while more or tasks:
        while more and len(tasks) < concurrency:
            try:
                key, body = next(requests)
            except StopIteration:
                more = False
                break
            request = request_hash(body)
            if request in keys:
                keys[request].append(key)
            elif answer := store.get(request):
                answered = True
                yield key, answer
            else:
                keys[request] = [key]
                tasks[runner.get_loop().create_task(endpoint.answer(body))] = request
        answers: dict[str, Answer] = {}
        for task in runner.run(_first(tasks)) if tasks else ():
            request, error = tasks.pop(task), task.exception()
            if isinstance(error, Refused):
                refused[request] = error
            elif error:
                runner.run(_keep_rest(tasks, endpoint, store))
                raise error
            else:
                answers[request] = task.result()
                store.put(request, answers[request])
        answered, at_end = answered or bool(answers), not (more or tasks)
        if refused and not answered and (len(refused) >= N_REFUSED or (at_end and store.is_empty())):
            runner.run(_keep_rest(tasks, endpoint, store))
            raise next(iter(refused.values()))
        if answered or at_end:  # of a run that goes on, the few that are left may all be refused
            for request, error in refused.items():
                answers[request] = error.answer
                if error.keep:
                    store.put(request, error.answer)
            refused.clear()
        for request, answer in answers.items():
            for key in keys.pop(request):
                yield key, answer


async def _first(tasks: Iterable[asyncio.Task]) -> set[asyncio.Task]:
    return (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]


async def _keep_rest(tasks: dict[asyncio.Task, str], endpoint: "Endpoint", store: Cache) -> None:
    """The run has failed: keep what is still being answered, for it is being paid for; try nothing again."""
    endpoint.stop.set()
    for task, answer in zip(tasks, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
        if isinstance(answer, Answer):
            store.put(tasks[task], answer)


class Refused(InputError):
    """The endpoint will not answer this request, whatever it does with others. answer: what stands for one.

    keep: whether another try would be in vain, so that the cache may hold it.
    """

    def __init__(self, line: str, answer: Answer, keep: bool = True):
        super().__init__(line)
        self.answer, self.keep = answer, keep


@dataclass(frozen=True)
class Failure:
    """What went wrong with one try."""

    reason: str
    may_pass: bool  # whether another try may help
    wait_s: float | None = None  # as the endpoint asks
    is_rate_limit: bool = False


class Endpoint:
    """A URL that answers, sooner or later or with an InputError."""

    def __init__(self, url: str, timeout_s: float, tries: int, concurrency: int):
        try:
            import openai
        except ImportError:
            raise InputError("asking an endpoint needs the package openai: pip install -e '.[data]'") from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url}: not the URL of an endpoint; expected one such as http://localhost:8000/v1")
        self.timeout_s, self.tries = timeout_s, tries
        self.n_paid = self.n_retries = 0
        self.stop = asyncio.Event()
        self.pace = Pace(concurrency, self.stop)
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # one's own server wants no key, but the package does
        self._secrets = [key, unquote(urlsplit(url).password or "")]
        self._listens_at, self.url = url, self._redact(url)  # the second to be shown
        self.client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout_s)

    def _redact(self, text: str) -> str:
        return redact(text, *self._secrets)

    async def answer(self, body: dict) -> Answer:
        """The answer to one request, tried again while that may help and no other request has failed for good."""
        answered_before, attempt = self.pace.n_answered, 0
        while True:
            await self.pace.enter()
            try:
                outcome = await self._try(body)
            finally:
                self.pace.leave()
            if isinstance(outcome, Answer):
                self.pace.answered()
                self.n_paid += 1
                return outcome
            attempt += 1
            wait_s = outcome.wait_s or FIRST_WAIT_S * 2 ** min(attempt - 1, 10) * random.uniform(0.5, 1.0)
            wait_s = min(wait_s, LONGEST_WAIT_S)
            if not outcome.may_pass:
                raise InputError(f"{self.url}: {outcome.reason}; {FIXED}")
            if attempt >= self.tries or self.stop.is_set():
                self._give_up(outcome, attempt, answered_before, body)
            self.n_retries += 1
            if outcome.is_rate_limit:
                self.pace.limited(wait_s)
            else:
                await self._sleep(wait_s)

    def _give_up(self, outcome: "Failure", attempt: int, answered_before: int, body: dict) -> None:
        """Raise if the request, or the endpoint, is beyond hope; return if another try is worth it."""
        line = f"{self.url}: {outcome.reason}, tried {attempt} times"
        if self.pace.n_answered > answered_before and not outcome.is_rate_limit:  # it is this request
            raise Refused(line, Answer("", outcome.reason, str(body.get("model")), 0, 0), keep=False)
        if self.stop.is_set() or self.pace.seconds_without_answer() >= PATIENCE_S:
            raise InputError(f"{line}; run again later, what is answered is kept")

    async def _try(self, body: dict) -> "Answer | Failure":
        """One request. Refused if the endpoint will not answer it."""
        import openai

        named = {key: body[key] for key in ("model", "messages") if key in body}
        rest = {key: value for key, value in body.items() if key not in named}  # the package knows not every field of a server
        try:
            async with asyncio.timeout(self.timeout_s):  # the package's own starts anew with every byte
                return self._read(await self.client.chat.completions.create(**named, extra_body=rest))
        except openai.APIStatusError as error:
            reason = self._redact(f"answers {error.status_code} ({first_line(error)})")
            if error.status_code in REFUSED:
                nothing = Answer("", reason, str(body.get("model")), 0, 0)
                raise Refused(f"{self.url}: {reason}; {FIXED}", nothing) from None
            may_pass = error.status_code in RETRIED or error.status_code >= 500
            wait_s = _seconds(error.response.headers.get("retry-after"))
            return Failure(reason, may_pass, wait_s, error.status_code in RATE_LIMITS)
        except (TimeoutError, openai.APITimeoutError):
            return Failure(f"no answer within {self.timeout_s:g} s", True)
        except openai.APIConnectionError as error:
            if not self.n_paid and nobody_listens(self._listens_at):
                return Failure("nobody listens there (connection refused)", False)
            return Failure(self._redact(f"no connection, or one cut off ({first_line(error.__cause__ or error)})"), True)
        except ValueError as error:  # not JSON, not UTF-8, or not a completion
            return Failure(self._redact(f"the response is not a chat completion ({first_line(error)})"), True)

    def _read(self, completion) -> Answer:
        """The first choice of a completion, which the package builds without checking; ValueError if it is none.

        Of a model that reasons, the thoughts are a field of their own (reasoning_content, reasoning): they are not read.
        """
        try:
            choice, usage = completion.choices[0], completion.usage
            text = choice.message.content
        except (AttributeError, TypeError, IndexError):
            raise ValueError(f"no choices in {str(completion)[:80]!r}") from None
        if not isinstance(text, str | None):
            raise ValueError(f"content is of type {type(text).__name__}")
        n_tokens = (getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens"))
        words = (self._redact(str(x)) for x in (text or "", choice.finish_reason, completion.model))
        return Answer(*words, *n_tokens)

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not on when the run has failed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)


def nobody_listens(url: str) -> bool:
    """Whether the URL is this machine's and refuses connections. Of others, behind a proxy say, it cannot be known."""
    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return False
    try:
        socket.create_connection((parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)), timeout=2).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; the form with a date is not worth its code."""
    try:
        return max(0.0, float(retry_after))
    except (TypeError, ValueError):
        return None

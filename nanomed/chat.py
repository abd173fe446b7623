"""Requests to an OpenAI-compatible endpoint: many at once, and each paid for once.

    for key, answer in ask(requests, url, cache=Path("labels.answers.sqlite"), n_requests=260_000):

A request is (key, body): the key is the caller's, the body goes to `POST URL/chat/completions` (`model`, `messages`,
`temperature`, ...; `vllm serve`, `transformers serve`, llama.cpp and the vendors all accept it). Answers come in order of
completion. Requests are taken from the iterable as there is room, so memory does not grow with their number.

Every answer is committed to the cache, an SQLite file keyed by the SHA-256 of the body, before the caller sees it: after
kill -9 the same command pays only for what was in flight. A body that comes twice in a run is asked once. The key has
no URL in it: another port is the same model; a model that changes must change its name.

What follows a failed try (nanomed/responses.py sorts failures):
- Overload (408, 429, 502, 503, 504, 529, a time-out): fewer requests in flight; a rate limit pauses all of them for as long
  as the server asks (nanomed/pacing.py).
- Any other failure that may pass (500, no connection, a body that is cut or no chat completion): the request waits
  1, 2, 4, ... 60 s. If it fails `tries` times while others are answered, it gets an Answer without words, which is not
  cached: the next run tries it again.
- A refusal (400, 403, 413, 422, ...): usually of one request, whose words are filtered, or which is too long. It gets an
  Answer without words whose finish_reason is what the endpoint said, cached like any other. Some endpoints refuse a wrong
  setting with the same status, that is all requests: so a refusal counts only once a request that was sent after it has
  been answered, and N_REFUSED refusals without an answer end the run.
- An error of all requests (401, 402, 404, no quota left) ends the run at once.
The run also ends if nothing has been answered for PATIENCE_S. It ends with one line; requests in flight are finished first.
"""

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from tqdm import tqdm

from nanomed import InputError, first_line
from nanomed.answer_cache import Answer, Cache
from nanomed.pacing import Pace
from nanomed.redaction import redactor, secrets_in, secrets_of, shown_url
from nanomed.responses import Failure, Refused, body_hint, failure_of, nobody_listens, read_completion, retry_after

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
PATIENCE_S = 300.0  # without any answer: then the run ends
LEAST_TRIES = 3  # of a request, before the run ends for lack of answers
FIX = "fix this and run again; what is answered is kept"
N_REFUSED = 20  # refusals without an answer: then every request is refused
RESERVED = ("model", "messages", "stream", "n")  # fields that --body must not change
BODY_EXAMPLE = '{"max_tokens": null, "max_completion_tokens": 64}'
BODY_HELP = f"JSON object with fields to add to every request; null removes one, as in '{BODY_EXAMPLE}'"


def parse_body(text: str | None) -> dict:
    """The JSON object of --body; {} without one. InputError if it is none, or has a field that the command sets itself."""
    try:
        extra = json.loads(text or "{}", parse_constant=_no_constant)
    except ValueError as error:
        raise InputError(f"--body: is not JSON ({error}); expected an object such as {BODY_EXAMPLE}") from None
    if not isinstance(extra, dict):
        raise InputError(f"--body: is a JSON {type(extra).__name__}, expected an object such as {BODY_EXAMPLE}")
    if reserved := [name for name in RESERVED if name in extra]:
        raise InputError(
            f"--body: {reserved[0]!r} cannot be changed; the command sets model and messages, and reads one whole answer"
        )
    return extra


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def with_extra(body: dict, extra: dict) -> dict:
    """The body of a request with the fields of --body; null removes a field."""
    return {name: value for name, value in (body | extra).items() if name not in extra or value is not None}


def request_hash(body: dict) -> str:
    """SHA-256 of the body's canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


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

    url: the endpoint's base, with its /v1. n_requests: for the bar. concurrency: most requests in flight. timeout_s: of one
    try, from sending to the last byte. tries: of one request, while others are answered. The API key, where one is needed, is
    read from OPENAI_API_KEY. InputError: see above.
    """
    store = Cache(cache)
    try:
        with (
            asyncio.Runner() as runner,
            tqdm(total=n_requests, desc=desc, unit="answer", smoothing=0, disable=None) as bar,
        ):
            endpoint = Endpoint(url, timeout_s, tries, concurrency)
            try:
                for key, answer in _answers(requests, endpoint, store, runner, concurrency, bar):
                    bar.set_postfix_str(endpoint.state(), refresh=False)
                    bar.update()
                    yield key, answer
            finally:
                runner.run(endpoint.client.close())
    finally:
        store.close()


def _answers(requests, endpoint: "Endpoint", store: Cache, runner, concurrency: int, bar) -> Iterator[tuple[object, Answer]]:
    """The loop of `ask`: start requests, wait for the first that are done, cache their answers and yield them."""
    tasks: dict[asyncio.Task, str] = {}  # → hash of its request
    keys: dict[str, list] = {}  # hash of a request in flight → the keys that want its answer
    refused: dict[str, Refused] = {}  # hash of a request → its refusal, until one sent later is answered
    n_tasks = max(2 * concurrency, 8)  # with those that wait for their next try, while others are sent
    limit, progressed = N_REFUSED, False  # refusals until no more is asked; whether any request was answered since
    requests, more = iter(requests), True
    while more or tasks:
        while more and len(tasks) < n_tasks and len(tasks) - endpoint.n_waiting < concurrency and len(refused) < limit:
            try:
                key, body = next(requests)
            except StopIteration:
                more = False
                break
            request = request_hash(body)
            if request in keys:
                keys[request].append(key)
            elif answer := store.get(request):
                yield key, answer
            else:
                keys[request] = [key]
                tasks[runner.get_loop().create_task(endpoint.answer(body))] = request
        answers: dict[str, Answer] = {}
        for task in runner.run(_first(tasks, endpoint, bar)) if tasks else ():
            request, error = tasks.pop(task), task.exception()
            if isinstance(error, Refused):
                refused[request] = error
            elif error:
                runner.run(_keep_rest(tasks, endpoint, store))
                raise error
            else:
                answers[request] = task.result()
                store.put(request, answers[request])
        progressed = progressed or bool(answers)
        settled = {request: error for request, error in refused.items() if error.at < endpoint.newest_answered}
        if refused and not tasks and not (more and len(refused) < limit):
            if more and progressed:  # those answered may all have been sent before
                limit, progressed = len(refused) + N_REFUSED, False
            elif more or len(refused) >= N_REFUSED or (store.is_empty() and all(e.is_cached for e in refused.values())):
                raise next(iter(refused.values()))
            else:  # of a run that goes on, the few that are left may all be refused
                settled = dict(refused)
        for request, error in settled.items():
            del refused[request]
            answers[request] = error.answer
            if error.is_cached:
                store.put(request, error.answer)
        limit = limit if refused else N_REFUSED
        for request, answer in answers.items():
            for key in keys.pop(request):
                yield key, answer


async def _first(tasks: Iterable[asyncio.Task], endpoint: "Endpoint", bar) -> set[asyncio.Task]:
    """The tasks that are done next. None after a second: then the bar shows why, and there may be room for other requests."""
    done, _ = await asyncio.wait(tasks, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        bar.set_postfix_str(endpoint.state())
    return done


async def _keep_rest(tasks: dict[asyncio.Task, str], endpoint: "Endpoint", store: Cache) -> None:
    """After a failure: finish the requests in flight, which are being paid for, and cache their answers; retry none."""
    endpoint.pace.stop()
    for task, answer in zip(tasks, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
        if isinstance(answer, Answer):
            store.put(tasks[task], answer)


class Endpoint:
    """A URL that answers requests, or raises InputError."""

    def __init__(self, url: str, timeout_s: float, tries: int, concurrency: int):
        try:
            import openai
        except ImportError:
            raise InputError("asking an endpoint needs the package openai: pip install -e '.[data]'") from None
        self.url = shown_url(url)
        if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
            raise InputError(f"{self.url}: not the URL of an endpoint; expected one such as http://localhost:8000/v1")
        self.timeout_s, self.tries = timeout_s, tries
        self.n_retries = self.n_waiting = 0  # n_waiting: requests that wait for their next try
        self.last_failure = ""
        self.newest_answered = 0.0  # when the newest of the answered requests was sent
        self.stopped = asyncio.Event()
        self.pace = Pace(concurrency, self.stopped)
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # a local server needs no key, but the package does
        if not (key.isascii() and key.isprintable()):
            raise InputError("OPENAI_API_KEY has characters that an HTTP header cannot hold; set it to the key alone")
        self._secrets = secrets_of(url, key)
        self._redact: Callable[[str], str] = redactor(self._secrets)
        parts = urlsplit(url)
        base = urlunsplit(parts._replace(query="", fragment=""))  # the package appends the path to the whole URL
        self.client = openai.AsyncOpenAI(
            base_url=base, api_key=key, max_retries=0, timeout=timeout_s, default_query=dict(parse_qsl(parts.query))
        )

    def state(self) -> str:
        """What is going on, for the progress bar."""
        text = f"{self.pace.n_answered:,} new, {self.n_retries:,} tried again"
        if self.pace.pause_left() > 1:
            return f"{text}, paused for {self.pace.pause_left():.0f} s: {self.last_failure[:60]}"
        silent_s = self.pace.seconds_without_answer()
        return f"{text}, no answer for {silent_s:.0f} s: {self.last_failure[:60]}" if silent_s > 10 and self.last_failure else text

    async def answer(self, body: dict) -> Answer:
        """The answer to one request, sent again while that may help and the run has not failed."""
        n_failed, n_alone, n_answered = 0, 0, self.pace.n_answered  # n_alone: failures while others were answered
        while True:
            sent_at = await self.pace.enter()
            try:
                if self.stopped.is_set():
                    raise InputError(f"{self.url}: not asked, the run has ended")
                found = await self._try(body)
            finally:
                self.pace.leave()
            if isinstance(found, Answer):
                self.pace.answered()
                self.newest_answered = max(self.newest_answered, sent_at)
                return found
            self.last_failure = found.reason
            if found.kind == "of all":
                raise InputError(f"{self.url}: {found.reason}; {FIX}")
            record = Answer("", found.reason, str(body.get("model")), 0, 0)
            if found.kind == "refused":
                raise Refused(f"{self.url}: {found.reason}{body_hint(found.reason)}; {FIX}", record, is_cached=True)
            n_failed += 1
            n_alone += self.pace.n_answered > n_answered
            n_answered = self.pace.n_answered
            line = f"{self.url}: {found.reason}, tried {n_failed} times"
            if n_alone >= self.tries * (4 if found.kind == "rate limit" else 1):  # which also meets requests at random
                raise Refused(line, record, is_cached=False)
            silent_s = self.pace.seconds_without_answer()
            if self.stopped.is_set() or (silent_s >= PATIENCE_S and n_failed >= min(self.tries, LEAST_TRIES)):
                raise InputError(f"{line}, no answer for {silent_s:.0f} s; run again later, what is answered is kept")
            self.n_retries += 1
            await self._wait(found, sent_at, n_failed)

    async def _wait(self, failure: Failure, sent_at: float, n_failed: int) -> None:
        """Slow down all requests after a sign of overload; after another failure, wait before this one's next try."""
        if failure.kind == "rate limit":
            backoff = min(FIRST_WAIT_S * 2 ** min(self.pace.n_overloads, 10), LONGEST_WAIT_S)
            self.pace.overloaded(sent_at, min(failure.wait_s or backoff, max(PATIENCE_S, LONGEST_WAIT_S)))
            return
        if failure.kind == "overload":
            self.pace.overloaded(sent_at)
        backoff = FIRST_WAIT_S * 2 ** min(n_failed - 1, 10) * random.uniform(0.5, 1.0)  # not all at the same time
        self.n_waiting += 1
        await self._sleep(min(failure.wait_s or backoff, LONGEST_WAIT_S))
        self.n_waiting -= 1

    async def _sleep(self, seconds: float) -> None:
        """Sleep; ends early when the run has failed."""
        await self.pace.sleep(seconds)

    async def _try(self, body: dict) -> Answer | Failure:
        """Send one request."""
        import openai

        redact = redactor(self._secrets | found) if (found := secrets_in(body)) else self._redact
        asked = {name: body[name] for name in ("model", "messages") if name in body}
        extra = {name: value for name, value in body.items() if name not in asked}  # the package rejects a server's own fields
        try:
            async with asyncio.timeout(self.timeout_s):  # the package's own starts anew with every byte
                completion = await self.client.chat.completions.create(**asked, extra_body=extra)
            if isinstance(error := getattr(completion, "error", None), dict):  # with status 200, as OpenRouter reports it
                status = error.get("code") if isinstance(error.get("code"), int) else 500
                return failure_of(status, redact(str(error.get("message") or error)), str(error.get("code")), None)
            return read_completion(completion, redact)
        except openai.APIStatusError as error:
            said = first_line(Exception(redact(str(error))))  # redacted before it is cut
            return failure_of(error.status_code, said, str(error.code or error.type), retry_after(error.response.headers))
        except (TimeoutError, openai.APITimeoutError):
            return Failure(f"no answer within {self.timeout_s:g} s", "overload")
        except openai.APIConnectionError as error:
            if not self.pace.n_answered and nobody_listens(self.url):
                return Failure("nobody listens there (connection refused)", "of all")
            said = first_line(Exception(redact(str(error.__cause__ or error))))
            return Failure(f"no connection, or one cut off ({said})", "passing")
        except ValueError as error:  # not JSON, not UTF-8, or not a completion
            said = first_line(Exception(redact(str(error))))
            return Failure(f"answers what is no chat completion ({said})", "passing")

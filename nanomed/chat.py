"""Chat: many requests to an OpenAI-compatible endpoint, at once, and each paid for once.

    for key, answer in ask(requests, url, cache=Path("labels.answers.sqlite"), n_requests=260_000):

A request is (key, body): the key is the caller's, the body goes to `POST URL/chat/completions` (`model`, `messages`,
`temperature`, ...; `vllm serve`, `transformers serve`, llama.cpp and the vendors all speak it). Answers come in order of
completion. Requests are taken from the iterable as there is room, so memory does not grow with their number.

Every answer is committed to the cache, an SQLite file keyed by the SHA-256 of the body, before the caller sees it: after
kill -9 the same command pays only for what was in flight. A body that comes twice in a run is asked once. The key has
no URL in it: another port is the same model; a model that changes must change its name.

What may pass is tried again, up to `tries` times, waiting 1, 2, 4, ... 60 s or what Retry-After says: no connection, a
time-out, 408, 409, 429, 5xx, a body that is cut or no chat completion. Then, and at once for most other statuses (a wrong
key, an unknown model) and where nobody has listened yet, the run ends with one line; what is in flight is waited for and
kept first.

400, 413 and 422 are said of one request: its words are filtered, or it is too long. It gets an Answer without words, kept
like any other, whose finish_reason is what the endpoint said. But some endpoints also say 400 to a wrong model or setting,
that is to everything: so nothing is believed before another request of the run has been answered, and 20 refusals with
none answered end the run.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import socket
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from nanomed import InputError, first_line

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
RETRIED = (408, 409, 429)  # and 5xx
REFUSED = (400, 413, 422)  # this request, and maybe every other
MEND = "mend that and run again, what is answered is kept"
N_REFUSED = 20  # with none answered: then it is every other


@dataclass(frozen=True)
class Answer:
    """What came back. An answer without words is "", its reason in finish_reason ("length", "content_filter", or
    "answers 400 (...)" where the endpoint refused the request)."""

    text: str
    finish_reason: str
    model: str  # as the endpoint names it
    prompt_tokens: int
    completion_tokens: int


class Cache:
    """Answers on disk by the hash of their request. One process at a time; InputError otherwise, or if it is no cache."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")  # a commit is an append; whole after any kill
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._db.execute("BEGIN IMMEDIATE")  # takes the lock now, not at the first answer
            self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            locked = "locked" in str(error)
            hint = "another run is using it; wait for it" if locked else "give another path, or delete it"
            raise InputError(f"{path}: cannot be used as the cache of answers ({error}); {hint}") from None

    def is_empty(self) -> bool:
        """Has no run kept an answer yet?"""
        return self._db.execute("SELECT 1 FROM answers").fetchone() is None

    def get(self, request: str) -> Answer | None:
        """The answer to the request with this hash, if it is there."""
        row = self._db.execute("SELECT answer FROM answers WHERE request = ?", (request,)).fetchone()
        return Answer(**json.loads(row[0])) if row else None

    def put(self, request: str, answer: Answer) -> None:
        """Keep an answer; committed on return. InputError if the disk is full."""
        try:
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (request, json.dumps(asdict(answer))))
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: an answer cannot be kept ({error}); make room and run again") from None

    def close(self) -> None:
        """Let the next process in."""
        self._db.close()


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

    url: the endpoint's base, with its /v1. n_requests: for the bar. concurrency: requests in flight. timeout_s: of one
    try, from sending to the last byte. The API key, where one is needed, is OPENAI_API_KEY's. InputError: see above.
    """
    store = Cache(cache)
    try:
        with (
            asyncio.Runner() as runner,
            tqdm(total=n_requests, desc=desc, unit="answer", smoothing=0, disable=None) as bar,
        ):
            endpoint = Endpoint(url, timeout_s, tries)
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
    """The endpoint will not answer this request, whatever it does with others. answer: what stands for one."""

    def __init__(self, line: str, answer: Answer):
        super().__init__(line)
        self.answer = answer


class Endpoint:
    """A URL that answers, sooner or later or with an InputError."""

    def __init__(self, url: str, timeout_s: float, tries: int):
        try:
            import openai
        except ImportError:
            raise InputError("asking an endpoint needs the package openai: pip install -e '.[data]'") from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url}: not the URL of an endpoint; expected one such as http://localhost:8000/v1")
        self.url, self.timeout_s, self.tries = url, timeout_s, tries
        self.n_paid = self.n_retries = 0
        self.stop = asyncio.Event()
        key = os.environ.get("OPENAI_API_KEY") or "none"  # one's own server wants no key, but the package does
        self.client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout_s)

    async def answer(self, body: dict) -> Answer:
        """The answer to one request, tried again while that may help and no other request has failed for good."""
        for attempt in range(self.tries):
            answer, reason, may_pass, wait_s = await self._try(body)
            if answer:
                self.n_paid += 1
                return answer
            if not may_pass:
                raise InputError(f"{self.url}: {reason}; {MEND}")
            if attempt + 1 < self.tries and not self.stop.is_set():
                self.n_retries += 1
                wait_s = wait_s or FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0)  # not all at once again
                await self._sleep(min(wait_s, LONGEST_WAIT_S))
        raise InputError(f"{self.url}: {reason}, tried {self.tries} times; run again later, what is answered is kept")

    async def _try(self, body: dict) -> tuple[Answer | None, str, bool, float | None]:
        """(answer or None, what went wrong, whether it may pass, how long the endpoint asks to wait)."""
        import openai

        try:
            async with asyncio.timeout(self.timeout_s):  # the package's own starts anew with every byte
                return _read(await self.client.chat.completions.create(**body)), "", False, None
        except openai.APIStatusError as error:
            reason = f"answers {error.status_code} ({first_line(error)})"
            if error.status_code in REFUSED:
                nothing = Answer("", reason, str(body.get("model")), 0, 0)
                raise Refused(f"{self.url}: {reason}; {MEND}", nothing) from None
            may_pass = error.status_code in RETRIED or error.status_code >= 500
            return None, reason, may_pass, _seconds(error.response.headers.get("retry-after"))
        except (TimeoutError, openai.APITimeoutError):
            return None, f"no answer within {self.timeout_s:g} s", True, None
        except openai.APIConnectionError as error:
            if not self.n_paid and nobody_listens(self.url):
                return None, "nobody listens there (connection refused)", False, None
            return None, f"no connection, or one cut off ({first_line(error.__cause__ or error)})", True, None
        except ValueError as error:  # not JSON, not UTF-8, or not a completion
            return None, f"answers what is no chat completion ({first_line(error)})", True, None

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


def _read(completion) -> Answer:
    """The first choice of a completion, which the package builds without checking; ValueError if it is none."""
    try:
        choice, usage = completion.choices[0], completion.usage
        text = choice.message.content
    except (AttributeError, TypeError, IndexError):
        raise ValueError(f"no choices in {str(completion)[:80]!r}") from None
    if not isinstance(text, str | None):
        raise ValueError(f"content is of type {type(text).__name__}")
    n_tokens = (getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text or "", str(choice.finish_reason), str(completion.model), *n_tokens)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; the form with a date is not worth its code."""
    try:
        return max(0.0, float(retry_after))
    except (TypeError, ValueError):
        return None

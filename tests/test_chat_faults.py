"""An endpoint that misbehaves: what may pass is tried again, what will not ends in one line, and nothing is lost."""

import time

import pytest

from chat_requests import _quick, collect, echo, fixture_patient, requests  # noqa: F401
from endpoint import completion, serving
from nanomed import InputError, chat
from nanomed.chat import ask

PASSING = {
    "429": 429,
    "429 with Retry-After": (429, {"Retry_After": "0.01"}),
    "429 with a date": (429, {"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "500": 500,
    "503": 503,
    "408": 408,
    "nonsense": b"<html>busy</html>",
    "cut JSON": b'{"choices": [{"mess',
    "cut body": "cut",
    "no answer": "drop",
    "not UTF-8": b'{"choices": "\xff\xfe"}',
    "empty choices": {"choices": []},
    "no choices": {"detail": "loading"},
    "null": b"null",
    "a list": b"[]",
    "no message": {"choices": [{}]},
    "content of another type": completion({"a": 1}),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(tmp_path, name):
    with serving(lambda request, number: PASSING[name] if number <= 2 else echo(request, number)) as endpoint:
        got = collect(endpoint, tmp_path / "cache", requests(3))
    assert got == {i: f"to text {i}" for i in range(3)}
    assert len(endpoint.bodies) == 9


def test_a_hanging_endpoint_is_tried_again(tmp_path):
    with serving(lambda request, number: "hang" if number == 1 else echo(request, number)) as endpoint:
        assert collect(endpoint, tmp_path / "cache", requests(2), timeout_s=2) == {0: "to text 0", 1: "to text 1"}


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_ends_in_one_line(tmp_path, name):
    with serving(lambda *_: PASSING[name]) as endpoint:
        with pytest.raises(InputError) as error:
            collect(endpoint, tmp_path / "cache", requests(1), tries=3)
        assert len(endpoint.bodies) == 3
    line = str(error.value)
    assert line.startswith(endpoint.url)
    assert "tried 3 times" in line
    assert "\n" not in line
    assert len(line) < 400


def test_a_hanging_endpoint_is_named(tmp_path):
    with serving(lambda *_: "hang") as endpoint, pytest.raises(InputError, match=r"no answer within 0\.2 s, tried 2"):
        collect(endpoint, tmp_path / "cache", requests(3), timeout_s=0.2, tries=2)


def test_an_endpoint_that_trickles_is_a_hanging_one(tmp_path):
    """A time-out between two bytes alone would start anew with every byte."""
    with serving(lambda *_: "trickle") as endpoint, pytest.raises(InputError, match="no answer within"):
        collect(endpoint, tmp_path / "cache", requests(1), timeout_s=0.5, tries=1)


def test_retry_after_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "LONGEST_WAIT_S", 60)
    times = []

    def behave(request, number):
        times.append(time.perf_counter())
        return (429, {"Retry_After": "0.7"}) if number == 1 else "JA"

    with serving(behave) as endpoint:
        collect(endpoint, tmp_path / "cache", requests(1))
    assert times[1] - times[0] >= 0.7


def test_waits_grow_and_are_bounded(tmp_path, monkeypatch):
    waits = []
    sleep = chat.Endpoint._sleep
    monkeypatch.setattr(chat.Endpoint, "_sleep", lambda self, seconds: waits.append(seconds) or sleep(self, 0.001))
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(chat, "LONGEST_WAIT_S", 10.0)
    monkeypatch.setattr(chat, "LEAST_TRIES", 7)
    with serving(lambda *_: 500) as endpoint, pytest.raises(InputError):
        collect(endpoint, tmp_path / "cache", requests(1), tries=7)
    assert len(waits) == 6
    assert all(low <= wait <= high for wait, low, high in zip(waits, (0.5, 1, 2, 4, 8, 10), (1, 2, 4, 8, 10, 10), strict=True))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_pass_is_not_tried_again(tmp_path, status):
    with serving(lambda *_: status) as endpoint:
        with pytest.raises(InputError, match=f"answers {status} .*said {status}"):
            collect(endpoint, tmp_path / "cache", requests(1))
        assert len(endpoint.bodies) == 1


def refusing(*texts, status=400):
    """Behave: refuse these texts at once, answer the others after a while, as models do."""
    return lambda request, n: status if request["messages"][0]["content"] in texts else ("after", 0.05, echo(request, n))


@pytest.mark.parametrize("concurrency", [1, 64])
@pytest.mark.parametrize("status", [400, 403, 413, 422, 451])
def test_one_request_that_is_refused_is_an_answer_without_words(tmp_path, status, concurrency):
    """Though it is the first to come back. It is kept as any other."""
    with serving(refusing("text 0", "text 3", status=status)) as endpoint:
        answers = dict(ask(requests(5), endpoint.url, tmp_path / "cache", concurrency=concurrency))
        assert [answers[i].text for i in range(5)] == ["", "to text 1", "to text 2", "", "to text 4"]
        assert answers[3] == chat.Answer("", f"answers {status} (Error code: {status} - said {status})", "tiny", 0, 0)
        assert dict(ask(requests(5), endpoint.url, tmp_path / "cache")) == answers
    assert len(endpoint.bodies) == 5


def test_after_an_answer_some_may_be_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "N_REFUSED", 3)
    with serving(refusing("text 1", "text 2")) as endpoint:
        got = collect(endpoint, tmp_path / "cache", requests(4), concurrency=1)
    assert got == {0: "to text 0", 1: "", 2: "", 3: "to text 3"}


def test_a_run_that_goes_on_may_have_nothing_left_but_what_is_refused(tmp_path):
    with serving(refusing("text 2")) as endpoint:
        collect(endpoint, tmp_path / "cache", requests(2))
        assert collect(endpoint, tmp_path / "cache", requests(1, first=2)) == {2: ""}


@pytest.mark.parametrize("n_kept", [0, 3])
@pytest.mark.parametrize("concurrency", [1, 64])
def test_where_everything_is_refused_the_run_ends_and_keeps_none(tmp_path, monkeypatch, concurrency, n_kept):
    """A wrong name of the model, whatever another model has answered into the same cache."""
    monkeypatch.setattr(chat, "N_REFUSED", 5)
    with serving(echo) as endpoint:
        collect(endpoint, tmp_path / "cache", requests(n_kept, first=500))
        endpoint.behave = lambda *_: 400
        with pytest.raises(InputError, match=r"answers 400 .*fix this and run again"):
            collect(endpoint, tmp_path / "cache", requests(80), concurrency=concurrency)
        assert len(endpoint.bodies) <= n_kept + chat.N_REFUSED + concurrency
        endpoint.behave = echo
        assert collect(endpoint, tmp_path / "cache", requests(9)) == {i: f"to text {i}" for i in range(9)}


def test_nobody_there(tmp_path):
    """At once where none has ever answered: nobody started the server, or the port is another."""
    with serving(echo) as endpoint:
        pass
    with pytest.raises(InputError, match=r"nobody listens there") as error:
        collect(endpoint, tmp_path / "cache", requests(1))
    assert "tried" not in str(error.value)


def test_an_answer_without_words_is_an_answer(tmp_path):
    with serving(lambda *_: completion(None, "content_filter")) as endpoint:
        ((_, answer),) = ask(requests(1), endpoint.url, tmp_path / "cache")
    assert (answer.text, answer.finish_reason) == ("", "content_filter")


def test_a_request_that_fails_while_others_are_answered_is_one_failure(tmp_path, patient):
    """It does not end the run, and is not kept: the next run asks again."""
    fails = lambda request, n: 500 if request["messages"][0]["content"] == "text 9" else echo(request, n)  # noqa: E731
    with serving(fails) as endpoint:
        answers = dict(ask(requests(30), endpoint.url, tmp_path / "cache", tries=2, concurrency=1))
        assert {i for i in answers if not answers[i].text} == {9}
        assert answers[9].finish_reason.startswith("answers 500")
        endpoint.behave = echo
        assert collect(endpoint, tmp_path / "cache", requests(30))[9] == "to text 9"
        assert sum(text != "text 9" for text in endpoint.paid()) == 29


def test_after_a_failure_the_same_call_goes_on(tmp_path):
    with serving(lambda request, n: 500 if len(endpoint.bodies) > 10 else echo(request, n)) as endpoint:
        with pytest.raises(InputError, match=r"answers 500 .*, tried 2 times, no answer for .*; run again later"):
            collect(endpoint, tmp_path / "cache", requests(20), tries=2, concurrency=1)
        endpoint.behave = echo
        assert len(collect(endpoint, tmp_path / "cache", requests(20))) == 20
    assert len(endpoint.bodies) == 10 + 2 + 10


def test_an_endpoint_that_starts_to_refuse_all_ends_the_run(tmp_path, monkeypatch):
    """A key whose limit is reached, or a model that is taken away: those refusals are no failures of the documents."""
    monkeypatch.setattr(chat, "N_REFUSED", 5)
    refuses = (403, {"error": {"message": "key limit exceeded"}})
    with serving(lambda request, n: refuses if len(endpoint.bodies) > 10 else echo(request, n)) as endpoint:
        with pytest.raises(InputError, match="key limit exceeded"):
            collect(endpoint, tmp_path / "cache", requests(200), concurrency=4)
        assert len(endpoint.bodies) <= 10 + 2 * 5 + 2 * 4
        endpoint.behave = echo
        assert collect(endpoint, tmp_path / "cache", requests(200)) == {i: f"to text {i}" for i in range(200)}


def test_refusals_that_come_faster_than_answers_end_nothing(tmp_path):
    """More than N_REFUSED of them, before the first answer of a slow model."""
    texts = [f"text {i}" for i in range(40) if i % 3]
    with serving(
        lambda request, n: 400 if request["messages"][0]["content"] in texts else ("after", 0.3, echo(request, n))
    ) as endpoint:
        got = collect(endpoint, tmp_path / "cache", requests(80), concurrency=16)
    assert got == {i: "" if i < 40 and i % 3 else f"to text {i}" for i in range(80)}


OF_ALL = {
    "401": (401, {"error": {"message": "wrong key"}}),
    "402": (402, {"error": {"message": "pay"}}),
    "404": (404, {"error": {"message": "no such model"}}),
    "no quota": (429, {"error": {"message": "you exceeded your quota", "code": "insufficient_quota"}}),
    "401 in a body": {"error": {"message": "wrong key", "code": 401}},
}


@pytest.mark.parametrize("name", OF_ALL)
def test_an_error_of_all_requests_ends_the_run_at_once(tmp_path, name):
    with serving(lambda request, n: OF_ALL[name] if len(endpoint.bodies) > 5 else echo(request, n)) as endpoint:
        with pytest.raises(InputError, match="fix this and run again") as error:
            collect(endpoint, tmp_path / "cache", requests(50), concurrency=2)
        assert len(endpoint.bodies) <= 5 + 2
    assert "\n" not in str(error.value)


def test_a_refusal_in_a_body_is_one_failure(tmp_path):
    """OpenRouter answers with status 200 and an error."""
    flagged = {"error": {"message": "flagged", "code": 403}}
    with serving(lambda request, n: flagged if "text 2" in str(request) else echo(request, n)) as endpoint:
        answers = dict(ask(requests(5), endpoint.url, tmp_path / "cache"))
    assert answers[2].finish_reason == "answers 403 (flagged)"
    assert answers[3].text == "to text 3"


def test_a_cache_without_an_answer_is_removed(tmp_path):
    with serving(lambda *_: 401) as endpoint, pytest.raises(InputError):
        collect(endpoint, tmp_path / "cache", requests(3))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_loop_leaves_a_whole_cache(tmp_path):
    def interrupted(endpoint) -> None:
        for n, _ in enumerate(ask(requests(20), endpoint.url, tmp_path / "cache", concurrency=2)):
            if n == 5:
                raise KeyboardInterrupt

    with serving(echo) as endpoint:
        with pytest.raises(KeyboardInterrupt):
            interrupted(endpoint)
        collect(endpoint, tmp_path / "cache", requests(20))
    assert len(endpoint.bodies) <= 22

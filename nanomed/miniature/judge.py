"""The miniature's judge: a stand-in for a large model that knows the right answers and compares facts and form.

An OpenAI-compatible endpoint on 127.0.0.1 for `eval.py judge`, in a thread. Of the two answers in the judge's prompt the
one with more points wins: one for the fact (its text is in the answer), one for the form (the answer has the right
form, whatever stands in it). It is deterministic and does not judge language: its win rates show that judging works and
who answers correctly, not what a reader would prefer.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nanomed.miniature.forms import FORMS

# of data/tasks/judge-de-v2.toml: name, number in the marks, text
PARTS = re.compile(r"<<<(ANFRAGE|ANTWORT 1|ANTWORT 2) (\w+)\n(.*?)\n?\1 \2>>>", re.DOTALL)


def has_form(prompt: str, answer: str) -> bool:
    """Does the answer, as a whole, have the form that the prompt asks for?"""
    return any(prompt.endswith(words) and form.pattern.fullmatch(answer.strip()) for words, form in FORMS.items())


def follows(record: dict, answer: str) -> bool:
    """Exactly the right answer; of a question (no colon in it) the form alone, since what it asks is knowledge."""
    if ":" in record["prompt"]:
        return answer.strip() == record["right"]
    return has_form(record["prompt"], answer)


def points(record: dict, answer: str) -> int:
    """0 to 2: the fact, and the form. record: a line of prompts.jsonl."""
    if "fact" not in record:
        return 2 * follows(record, answer)
    return (record["fact"].lower() in answer.lower()) + has_form(record["prompt"], answer)


def verdict(key: dict[str, dict], content: str) -> str:
    """The judge's words on a prompt of eval.py judge. key: record by prompt."""
    parts = {name: text for name, _, text in PARTS.findall(content)}
    if parts.keys() != {"ANFRAGE", "ANTWORT 1", "ANTWORT 2"} or parts["ANFRAGE"] not in key:
        return "Die Anfrage ist nicht zu erkennen."
    one, two = (points(key[parts["ANFRAGE"]], parts[f"ANTWORT {i}"]) for i in (1, 2))
    return f"Punkte: {one} und {two}.\nURTEIL: {'GLEICH' if one == two else 1 if one > two else 2}"


@contextmanager
def serving(key: dict[str, dict]) -> Iterator[str]:
    """The endpoint's URL, inside a with block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            message = {"role": "assistant", "content": verdict(key, body["messages"][0]["content"])}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            about = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
            reply = json.dumps(about | {"choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()

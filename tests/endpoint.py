"""A small OpenAI-compatible endpoint on this machine that can misbehave in every way a real one does. No test itself."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text: str | None, finish_reason: str = "stop") -> dict:
    """The body of a good answer."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    about = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny"}
    return about | {"choices": [choice], "usage": usage}


class Endpoint:
    """What the endpoint got and how much of it at once. behave(body, number of this body's try) → what to do."""

    def __init__(self, behave: Callable[[dict, int], object]):
        self.behave, self.bodies, self.tries = behave, [], {}
        self.headers: list[dict] = []  # of every request
        self.now = self.most = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.url = ""

    def paid(self) -> list[str]:
        """The last message of every request, in order of arrival."""
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextlib.contextmanager
def serving(behave: Callable[[dict, int], object]) -> Iterator[Endpoint]:
    """An endpoint for the length of a with block.

    behave returns a text (a good answer), a dict (this JSON), bytes (this body), a status, (status, headers),
    (status, {"error": ...}), "hang",
    "cut" (half a body), "trickle" (byte after byte, without end), "drop" (no answer at all), or
    ("after", seconds, one of these).
    """
    endpoint = Endpoint(behave)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with endpoint.lock:
                endpoint.bodies.append(body)
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                key = json.dumps(body, sort_keys=True)
                endpoint.tries[key] = endpoint.tries.get(key, 0) + 1
                number = endpoint.tries[key]
                endpoint.now += 1
                endpoint.most = max(endpoint.most, endpoint.now)
            with contextlib.suppress(OSError):  # the client may be gone
                self.act(endpoint.behave(body, number))
            with endpoint.lock:
                endpoint.now -= 1

        def act(self, action) -> None:
            if isinstance(action, tuple) and action[0] == "after":
                time.sleep(action[1])
                action = action[2]
            if action == "hang":
                endpoint.closing.wait(30)
                self.close_connection = True
            elif action == "trickle":
                self.send(200, b" ", declared=10_000)
                while not endpoint.closing.wait(0.1):
                    self.wfile.write(b" ")
            elif action == "drop":
                self.close_connection = True
                self.connection.close()
            elif action == "cut":
                self.send(200, json.dumps(completion("JA")).encode(), declared=10_000)
                self.close_connection = True
            elif isinstance(action, int):
                self.send(action, json.dumps({"error": {"message": f"said {action}"}}).encode())
            elif isinstance(action, tuple) and "error" in action[1]:
                self.send(action[0], json.dumps(action[1]).encode())
            elif isinstance(action, tuple):
                self.send(action[0], b"{}", **action[1])
            elif isinstance(action, bytes):
                self.send(200, action)
            else:
                self.send(200, json.dumps(action if isinstance(action, dict) else completion(action)).encode())

        def send(self, status: int, body: bytes, declared: int | None = None, **headers) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(declared or len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.closing.set()
        server.shutdown()
        server.server_close()

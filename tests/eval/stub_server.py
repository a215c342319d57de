"""A real HTTP server for tests: /v1/models, and /v1/completions with scripted texts, streamed or not."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lightship.endpoint import Endpoint

Reply = tuple[str, str]
"""Text and finish_reason."""


@dataclass
class Stub:
    """A running server: where it is, and what it was asked."""

    endpoint: Endpoint
    prompts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    """The Authorization headers of all requests."""


@contextmanager
def serving(
    tokenizer: Path,
    reply: Callable[[str], Reply] = lambda _: ("", "stop"),
    *,
    status: int = 200,
    seconds_per_token: float = 0.0,
    tokens_short: int = 0,
    breaks: Callable[[int], bool] = lambda _: False,
    one_at_a_time: bool = False,
    context_tokens: int | None = None,
) -> Iterator[Stub]:
    """Serve until the block ends.

    Args:
        reply: prompt text -> text and finish_reason, for requests that are not streamed.
        status: answer every completion with this status.
        seconds_per_token: how long a streamed token takes.
        tokens_short: stop a stream this many tokens early.
        breaks: whether the n-th streamed request reports an error in mid-stream.
        one_at_a_time: streams wait for one another, so that there is a rate beyond which they pile up.
        context_tokens: what /v1/models says of the model's context.
    """
    from transformers import AutoTokenizer

    turn: AbstractContextManager[object] = threading.Lock() if one_at_a_time else nullcontext()
    decode = AutoTokenizer.from_pretrained(tokenizer).decode

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            stub.keys.append(self.headers["Authorization"])
            self._send({"data": [{"id": "tiny"} | ({"max_model_len": context_tokens} if context_tokens else {})]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.bodies.append(body)
            stub.keys.append(self.headers["Authorization"])
            stub.started.append(time.perf_counter())
            if status != 200:
                self._send({"error": {"message": "the experts are on holiday"}}, status)
            elif body.get("stream"):
                with turn, suppress(ConnectionError):
                    self._stream(body, len(stub.bodies))
            else:
                stub.prompts.append(decode(body["prompt"][0]))
                text, finish_reason = reply(stub.prompts[-1])
                self._send({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})

        def _send(self, value: object, code: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, body: dict[str, Any], number: int) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            tokens = body["max_tokens"] - tokens_short
            for _ in range(tokens):
                time.sleep(seconds_per_token)
                self._event({"choices": [{"index": 0, "text": "a"}]})
                if breaks(number):
                    self._event({"error": {"message": "out of memory"}})
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
            self._event({"choices": [], "usage": usage})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

        def _event(self, value: object) -> None:
            self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(Endpoint(f"http://127.0.0.1:{server.server_port}", "tiny", tokenizer))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A real HTTP server for tests: /v1/models, completions and chat completions with scripted texts, streamed or not."""

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
    """The Authorization header of each request."""


@contextmanager
def serving(
    tokenizer: Path | None,
    reply: Callable[[str], Reply] = lambda _: ("", "stop"),
    *,
    status: int = 200,
    seconds_per_token: float = 0.0,
    tokens_short: int = 0,
    breaks: Callable[[int], bool] = lambda _: False,
    fails: Callable[[int], int | None] = lambda _: None,
    seconds: float = 0.0,
    message: dict[str, Any] | None = None,
    key: str | None = None,
    names: tuple[str, ...] = ("tiny",),
    one_at_a_time: bool = False,
    context_tokens: int | None = None,
) -> Iterator[Stub]:
    """Serve until the block ends.

    Args:
        tokenizer: of the prompts; chat has none.
        reply: prompt text -> text and finish_reason, for requests that are not streamed.
        status: answer every completion with this status.
        seconds_per_token: how long a streamed token takes.
        tokens_short: stop a stream this many tokens early.
        breaks: whether the n-th streamed request reports an error in mid-stream.
        fails: a status with which the n-th request is answered, or 0 to close its connection.
        seconds: how long an answer that is not streamed takes.
        message: more of a chat answer's message, `reasoning_content` for one.
        names: the models that it lists.
        key: refuse requests without this API key, and repeat in the refusal the one that was given.
        one_at_a_time: streams wait for one another, so that there is a rate beyond which they pile up.
        context_tokens: what /v1/models says of the model's context.
    """
    turn: AbstractContextManager[object] = threading.Lock() if one_at_a_time else nullcontext()
    decode = _decoder(tokenizer) if tokenizer else str

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            stub.keys.append(self.headers["Authorization"])
            if key is None or self.headers["Authorization"] == f"Bearer {key}":
                more = {"max_model_len": context_tokens} if context_tokens else {}
                self._send({"data": [{"id": name, **more} for name in names]})
            else:
                self._send({"error": {"message": f"{self.headers['Authorization']} is not a key"}}, 401)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.bodies.append(body)
            stub.started.append(time.perf_counter())
            stub.keys.append(self.headers["Authorization"])
            failure = fails(len(stub.bodies))
            if failure == 0:
                self.close_connection = True
            elif failure:
                self._send({"error": {"message": "the experts are on holiday"}}, failure)
            elif status != 200:
                self._send({"error": {"message": "the experts are on holiday"}}, status)
            elif body.get("stream"):
                with turn, suppress(ConnectionError):
                    self._stream(body, len(stub.bodies))
            else:
                time.sleep(seconds)
                chat = "messages" in body
                prompt = body["messages"][-1]["content"] if chat else decode(body["prompt"][0])
                stub.prompts.append(prompt)
                text, finish_reason = reply(prompt)
                said = {"message": {"content": text} | (message or {})} if chat else {"text": text}
                logprobs = {"token_logprobs": [-0.5] * 10_000, "top_logprobs": [{"a": -0.5}] * 10_000}
                said |= {"logprobs": logprobs} if "logprobs" in body else {}
                self._send({"choices": [{"index": 0, "finish_reason": finish_reason, **said}]})

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
    stub = Stub(Endpoint(f"http://127.0.0.1:{server.server_port}", "tiny", tokenizer or Path()))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _decoder(tokenizer: Path) -> Callable[[list[int]], str]:
    from transformers import AutoTokenizer

    decode: Callable[[list[int]], str] = AutoTokenizer.from_pretrained(tokenizer).decode
    return decode

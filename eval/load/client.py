"""One streamed completion over HTTP, timed: what is sent is ready beforehand, so that sending takes microseconds.

    async with open_client(endpoint) as client:
        sample = await client.ask(client.body_of(request), Sample(due=None, asked=32))

aiohttp, because httpx takes several times the processor time for each event: benchmarks/load_overhead.md.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from lightship.endpoint import Endpoint
from lightship.eval.load.workload import Request

if TYPE_CHECKING:
    import aiohttp

REQUEST_SECONDS = 600
CONNECT_SECONDS = 30
KEEP_ALIVE_SECONDS = 4
"""Below the five seconds after which uvicorn closes an idle connection: a request must not meet a closing one."""
SAID_CHARACTERS = 500
"""Of an error's body that are kept."""


@dataclass
class Sample:
    """One request as it happened; times are of `time.perf_counter`, 0 where it has not come so far."""

    due: float | None
    """When it should be sent; None at fixed concurrency."""
    asked: int
    """Tokens to generate."""
    begun: float = 0.0
    """When sending began; latencies count from here, so connecting is part of them."""
    written: float = 0.0
    """When its header was handed to the socket; lateness counts to here."""
    arrivals: list[float] = field(default_factory=list)
    """When each event that carries a token arrived."""
    prompt_tokens: int = 0
    generated: int = 0
    """As the server counts them; the events, if it does not count."""
    error: str | None = None
    """The kind of failure."""
    said: str = ""
    """The failure in the server's or the client's words."""
    done: bool = False

    def fail(self, kind: str, said: str) -> None:
        """Note why there is no answer."""
        self.error, self.said, self.done = kind, said[:SAID_CHARACTERS], True


class RequestError(Exception):
    """The server answered, but not with a completion. Its arguments are the kind and what the server said."""


class Choice(msgspec.Struct):
    """A choice of an event; a chat's text is elsewhere, but its finish_reason is not."""

    text: str = ""
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """What the server counted."""

    completion_tokens: int = 0
    prompt_tokens: int = 0


class Event(msgspec.Struct):
    """A server-sent event of a completion, as far as it is needed. A failure in mid-stream is an event too."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Event).decode


class Client:
    """Sends completions to one endpoint."""

    def __init__(self, endpoint: Endpoint, session: "aiohttp.ClientSession") -> None:
        self._model = endpoint.model
        self._url = f"{endpoint.base_url.rstrip('/')}/v1/completions"
        self._session = session

    def body_of(self, request: Request) -> bytes:
        """The request's JSON: greedy, and exactly as many tokens as asked for."""
        return msgspec.json.encode(
            {
                "model": self._model,
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )

    async def ask(self, body: bytes, sample: Sample) -> Sample:
        """Send, read the stream to its end, and fill in the sample; what fails is its error and is not raised."""
        import aiohttp

        sample.begun = time.perf_counter()
        try:
            async with self._session.post(self._url, data=body, trace_request_ctx=sample) as response:
                if response.status >= 400:
                    raise RequestError(f"HTTP {response.status}", f"{response.status} {await response.text()}")
                await _read(response.content, sample)
        except RequestError as error:
            sample.fail(*error.args)
        except msgspec.DecodeError as error:
            sample.fail("not a completion", str(error))
        except aiohttp.ClientConnectorError as error:
            sample.fail("cannot connect", str(error))
        except TimeoutError as error:
            sample.fail("timed out", str(error) or f"no end after {REQUEST_SECONDS} s")
        except aiohttp.ClientError as error:
            sample.fail("connection lost", str(error) or type(error).__name__)
        else:
            sample.generated = sample.generated or len(sample.arrivals)
            if not sample.arrivals:
                sample.fail("empty answer", "the stream ended without a token")
        sample.done = True
        return sample


async def _read(stream: "aiohttp.StreamReader", sample: Sample) -> None:
    """Note when tokens arrive; several events in one packet have arrived together."""
    rest = b""
    async for packet in stream.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + packet).split(b"\n")
        for line in lines:
            data = line[5:].strip() if line.startswith(b"data:") else b""
            if not data or data == b"[DONE]":
                continue
            event = _decode(data)
            if event.error is not None:
                raise RequestError("error in the stream", msgspec.json.encode(event.error).decode())
            # The last event may carry no more than the reason why the answer ends.
            if event.choices and (
                event.choices[0].text or event.choices[0].finish_reason is None or not sample.arrivals
            ):
                sample.arrivals.append(now)
            if event.usage:
                sample.generated, sample.prompt_tokens = event.usage.completion_tokens, event.usage.prompt_tokens


@asynccontextmanager
async def open_client(endpoint: Endpoint) -> AsyncIterator[Client]:
    """A client with as many connections as requests in flight; proxies of the environment are not used."""
    import aiohttp

    async def note(_: object, context: Any, __: object) -> None:
        context.trace_request_ctx.written = time.perf_counter()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(note)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS),
        headers={"Content-Type": "application/json"} | endpoint.headers,
        trust_env=False,
        trace_configs=[trace],
    ) as session:
        # The first request of a session loads modules, which takes longer than a request may be late.
        with suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(
                f"{endpoint.base_url.rstrip('/')}/v1/models", trace_request_ctx=Sample(None, 0)
            ) as hello:
                await hello.read()
        yield Client(endpoint, session)

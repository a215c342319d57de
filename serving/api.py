"""The local engine's OpenAI-compatible HTTP API.

    POST /v1/completions  POST /v1/chat/completions  GET /v1/models  GET /health  GET /metrics

Errors have OpenAI's JSON form. A client that hangs up cancels its sequences.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightship.errors import ServingError
from lightship.serving.answers import ChatAnswers, CompletionAnswers, error_body, status_of
from lightship.serving.engine import Deliver, Engine
from lightship.serving.generation import Piece, Sequence
from lightship.serving.metrics import Metrics
from lightship.serving.protocol import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Served:
    """The model as requests may use it."""

    name: str
    tokenizer: Any
    context_tokens: int
    """Prompt and completion together."""
    vocabulary: int


class ApiError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind

    def response(self) -> JSONResponse:
        return JSONResponse(error_body(str(self), self.status, self.kind), status_code=self.status)


def create_app(engine: Engine, served: Served) -> FastAPI:
    """The ASGI application; it starts the engine, and stops it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="lightship", lifespan=lifespan)
    app.add_middleware(CountRequests, metrics=engine.metrics)
    created = int(time.time())

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()]
        return ApiError(400, "; ".join(problems)).response()

    @app.exception_handler(ServingError)
    async def _(_: Request, error: ServingError) -> JSONResponse:
        status, kind = status_of(error)
        return ApiError(status, str(error), kind).response()

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"the server failed on this request: {type(error).__name__}", "server_error").response()

    @app.get("/health")
    async def health() -> JSONResponse:
        if engine.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed" if engine.failure else "loading"}, status_code=503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": served.name, "object": "model", "created": created, "owned_by": "lightship"}
        return {"object": "list", "data": [model | {"max_model_len": served.context_tokens}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(body.model, served, engine)
        prompts = [prompt_of(prompt, served.tokenizer) for prompt in body.prompts]
        prompt_logprobs = body.echo and body.logprobs is not None
        sampling = body.sampling(body.max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
        sequences = _sequences(prompts, sampling, served, streaming=body.stream)
        echoes = [prompt.echo(served.tokenizer) for prompt in prompts] if body.echo else []
        answers = CompletionAnswers(served.name, served.tokenizer, sequences, echoes, body.logprobs)
        return await _answer(request, engine, answers, stream=body.stream, usage=_wants_usage(body))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _check_model(body.model, served, engine)
        text = _chat_text(body, served.tokenizer)
        tokens = served.tokenizer.encode(text, add_special_tokens=False)
        room = max(1, served.context_tokens - len(tokens))
        logprobs = body.top_logprobs if body.logprobs else None
        sampling = body.sampling(body.max_completion_tokens or body.max_tokens or room, logprobs=logprobs)
        sequences = _sequences([Prompt(tokens)], sampling, served, streaming=body.stream)
        answers = ChatAnswers(served.name, served.tokenizer, sequences, logprobs)
        return await _answer(request, engine, answers, stream=body.stream, usage=_wants_usage(body))

    return app


class CountRequests:
    """ASGI middleware: counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = route.path if route else "unknown"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


async def pieces_of(engine: Engine, sequences: list[Sequence]) -> AsyncIterator[tuple[int, Piece]]:
    """Run sequences together; yields (which, piece) as they come. Cancels what is unfinished when it is closed."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
    unfinished = set(range(len(sequences)))

    def deliverer(index: int) -> Deliver:
        return lambda piece: loop.call_soon_threadsafe(queue.put_nowait, (index, piece))

    try:
        for index, sequence in enumerate(sequences):
            engine.submit(sequence, deliverer(index))
        while unfinished:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece.finish_reason:
                unfinished.discard(index)
            yield index, piece
    finally:
        for index in unfinished:
            engine.cancel(sequences[index])


async def _answer(
    request: Request, engine: Engine, answers: CompletionAnswers | ChatAnswers, *, stream: bool, usage: bool
) -> Response:
    pieces = pieces_of(engine, answers.sequences)
    if stream:
        return StreamingResponse(answers.events(pieces, usage=usage), media_type="text/event-stream")
    body = await _unless_disconnected(request, answers.whole(pieces))
    return JSONResponse(body) if body is not None else Response(status_code=499)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """The result of `work`; None, and `work` cancelled, if the client hangs up first."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.create_task(work), asyncio.create_task(hung_up())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        gone.cancel()


def _wants_usage(body: CompletionRequest | ChatRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _check_model(model: str | None, served: Served, engine: Engine) -> None:
    if model not in (None, served.name):
        raise ApiError(404, f"the model {model!r} does not exist; this server has {served.name!r}", "not_found_error")
    if not engine.ready:
        raise ApiError(503, "the model is still loading; wait until /health answers 200", "service_unavailable")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it, and the text that a client gave, if it did."""

    tokens: list[int]
    text: str | None = None
    unwritten: int = 0
    """First tokens that the tokenizer put before the client's text; they have no part in it."""

    def echo(self, tokenizer: Any) -> str:
        """The text to repeat, special tokens written out, as `text_offset` counts them."""
        return tokenizer.decode(self.tokens, skip_special_tokens=False) if self.text is None else self.text


def prompt_of(prompt: str | list[int], tokenizer: Any) -> Prompt:
    """A completion's prompt, given as text or as token ids."""
    if not isinstance(prompt, str):
        return Prompt(prompt)
    tokens, written = tokenizer.encode(prompt), tokenizer.encode(prompt, add_special_tokens=False)
    begins = [n for n in range(len(tokens) - len(written) + 1) if tokens[n : n + len(written)] == written]
    return Prompt(tokens, prompt, max(begins, default=0))


def _chat_text(body: ChatRequest, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ApiError(400, "the checkpoint's tokenizer has no chat template; use /v1/completions")
    messages = [message.model_dump() for message in body.messages]
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ApiError(400, f"messages: the model's chat template refuses them: {error}") from error
    return text


def _sequences(prompts: list[Prompt], sampling: Any, served: Served, *, streaming: bool) -> list[Sequence]:
    if not prompts:
        raise ApiError(400, "prompt: the list of prompts is empty")
    for prompt in (p.tokens for p in prompts):
        if not prompt:
            raise ApiError(400, "prompt: a prompt has no tokens; give it one or more")
        if len(prompt) + sampling.max_tokens > served.context_tokens:
            raise ApiError(
                400,
                f"prompt: {len(prompt)} tokens and max_tokens {sampling.max_tokens} are more than the model's context "
                f"of {served.context_tokens} tokens; shorten the prompt or lower max_tokens",
            )
        if not 0 <= min(prompt) <= max(prompt) < served.vocabulary:
            raise ApiError(400, f"prompt: token ids must be from 0 to {served.vocabulary - 1}")
    return [Sequence(p.tokens, sampling, streaming, p.unwritten) for p in prompts]

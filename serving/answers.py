"""Pieces of generated text as OpenAI's JSON: whole, or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any

from lightship.errors import ServingError
from lightship.serving.generation import Piece, Sequence, SequenceError, Token

Pieces = AsyncIterator[tuple[int, Piece]]
Json = dict[str, Any]


class Answers:
    """The choices of one request; a subclass knows how its endpoint writes them."""

    object = ""
    chunk_object = ""

    def __init__(self, model: str, tokenizer: Any, sequences: list[Sequence], prefix: str) -> None:
        self.sequences = sequences
        self.head: Json = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.text_of = lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))

    def choice(self, index: int, piece: Piece) -> Json:
        """A whole choice."""
        raise NotImplementedError

    def opening(self, index: int) -> Json | None:
        """The choice of a first chunk that goes before any generated text."""
        raise NotImplementedError

    def chunk(self, index: int, piece: Piece) -> Json:
        """The choice of a chunk."""
        raise NotImplementedError

    async def whole(self, pieces: Pieces) -> Json:
        """Wait for all pieces: the response's body."""
        choices = {index: self.choice(index, piece) async for index, piece in pieces}
        return self._body(self.object, [choices[index] for index in sorted(choices)]) | {"usage": self._usage()}

    async def events(self, pieces: Pieces, *, usage: bool) -> AsyncIterator[str]:
        """The response's body as server-sent events, the last with the usage if `usage`."""
        extra: Json = {"usage": None} if usage else {}
        for index in range(len(self.sequences)):
            if opening := self.opening(index):
                yield _event(self._body(self.chunk_object, [opening]) | extra)
        try:
            async for index, piece in pieces:
                yield _event(self._body(self.chunk_object, [self.chunk(index, piece)]) | extra)
        except ServingError as error:
            yield _event(error_body(str(error), *status_of(error)))
            return
        if usage:
            yield _event(self._body(self.chunk_object, []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return self.head | {"object": kind, "choices": choices}

    def _usage(self) -> Json:
        prompt, generated = (sum(map(len, lists)) for lists in self._token_lists())
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _token_lists(self) -> tuple[list[list[int]], list[list[int]]]:
        return [s.prompt for s in self.sequences], [s.generated for s in self.sequences]


class CompletionAnswers(Answers):
    """Of /v1/completions; `echoes` are the prompts to repeat, none if not asked for."""

    object = chunk_object = "text_completion"

    def __init__(
        self, model: str, tokenizer: Any, sequences: list[Sequence], echoes: list[str], logprobs: int | None
    ) -> None:
        super().__init__(model, tokenizer, sequences, "cmpl")
        self.echoes = echoes
        self.logprobs = logprobs

    def choice(self, index: int, piece: Piece) -> Json:
        choice = self.chunk(index, piece)
        if self.echoes:
            choice["text"] = self.echoes[index] + choice["text"]
        return choice

    def opening(self, index: int) -> Json | None:
        return self.chunk(index, Piece(self.echoes[index], [], None)) if self.echoes else None

    def chunk(self, index: int, piece: Piece) -> Json:
        logprobs = self._legacy_logprobs(piece.tokens) if self.logprobs is not None else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _legacy_logprobs(self, tokens: list[Token]) -> Json:
        return {
            "tokens": [self.text_of(t.id) for t in tokens],
            "token_logprobs": [t.likelihood and t.likelihood.logprob for t in tokens],
            "top_logprobs": [self._top_by_text(t) for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _top_by_text(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens and the token itself; of tokens with the same text, the likeliest."""
        if token.likelihood is None:
            return None
        own = {self.text_of(token.id): token.likelihood.logprob}
        return own | {self.text_of(id_): logprob for id_, logprob in reversed(token.likelihood.top)}


class ChatAnswers(Answers):
    """Of /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Any, sequences: list[Sequence], logprobs: int | None) -> None:
        super().__init__(model, tokenizer, sequences, "chatcmpl")
        self.logprobs = logprobs

    def choice(self, index: int, piece: Piece) -> Json:
        return self._choice(index, "message", {"role": "assistant", "content": piece.text}, piece)

    def opening(self, index: int) -> Json | None:
        return self._choice(index, "delta", {"role": "assistant", "content": ""}, Piece("", [], None))

    def chunk(self, index: int, piece: Piece) -> Json:
        return self._choice(index, "delta", {"content": piece.text}, piece)

    def _choice(self, index: int, key: str, message: Json, piece: Piece) -> Json:
        logprobs = {"content": [self._entry(t) for t in piece.tokens]} if self.logprobs is not None else None
        return {"index": index, key: message, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _entry(self, token: Token) -> Json:
        assert token.likelihood is not None
        top = [self._written(id_, logprob) for id_, logprob in token.likelihood.top]
        return self._written(token.id, token.likelihood.logprob) | {"top_logprobs": top}

    def _written(self, token: int, logprob: float) -> Json:
        text = self.text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def status_of(error: ServingError) -> tuple[int, str]:
    """The HTTP status of an engine's error, and OpenAI's type of it."""
    return (500, "server_error") if isinstance(error, SequenceError) else (503, "service_unavailable")


def error_body(message: str, status: int, kind: str) -> Json:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"

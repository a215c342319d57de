"""In-flight batching: requests join and leave between steps, and one step serves them all.

    generator = Generator(RaggedModel(load_causal_lm(path)).run, load_tokenizer(path), eos={1})
    generator.add(Sequence(prompt_ids, Sampling(max_tokens=20, temperature=0)))
    while not generator.idle:
        for sequence, piece in generator.step(): ...

A step holds one token of each running sequence and up to STEP_TOKENS tokens of prompts, longer prompts in several
steps: a newcomer waits for one step at most while there is room, and nobody waits for a long prompt. Pure bookkeeping
around `run`; neither threads nor processes are known here. What fails in one sequence's bookkeeping ends that sequence;
what fails in `run` ends the step.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import torch

from lightship.errors import ServingError
from lightship.serving.detokenize import TextStream
from lightship.serving.ragged import Span, Step
from lightship.serving.sampling import Likelihood, Sampling, draw, likelihoods

FinishReason = Literal["stop", "length"]
STEP_TOKENS = 2048
RUNNING = 32
"""Sequences in flight at once; more wait."""
_ids = count()


class SequenceError(ServingError):
    """One sequence has failed by itself; the others go on."""


@dataclass(frozen=True)
class Token:
    """A token as `logprobs` reports it; `likelihood` is None for the very first of a prompt."""

    id: int
    offset: int
    """Where its text begins, in characters from the start of the prompt if that is echoed, else of the completion."""
    likelihood: Likelihood | None


@dataclass(frozen=True)
class Piece:
    """What a sequence has gained since its last piece: the text, its tokens if logprobs are asked, and why it ended."""

    text: str
    tokens: list[Token]
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Sequence:
    """One prompt and what has been generated from it."""

    prompt: list[int]
    sampling: Sampling
    streaming: bool = False
    """Give a piece a step, not one at the end."""
    unwritten: int = 0
    """First tokens of the prompt that the tokenizer put before the client's text, and that its echo lacks."""
    id: int = field(default_factory=lambda: next(_ids))
    generated: list[int] = field(default_factory=list)
    read: int = 0
    """Prompt tokens that the model has read."""
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    """Both in seconds of `time.perf_counter`."""

    def span(self, budget: int) -> Span | None:
        """The next tokens to compute: one in decoding, else as much of the prompt as fits, None if nothing does."""
        if self.read == len(self.prompt):
            return Span(self.id, self.generated[-1:], 1)
        part = self.prompt[self.read : self.read + budget]
        if not part:
            return None
        whole = self.read + len(part) == len(self.prompt)
        return Span(self.id, part, len(part) if self.sampling.prompt_logprobs else int(whole))


class _Output:
    """A sequence's text and reported tokens, and how much of them has been handed out."""

    def __init__(self, sequence: Sequence, tokenizer: Any) -> None:
        sampling = sequence.sampling
        self.sequence = sequence
        self.random = sampling.generator()
        self.stream = TextStream(tokenizer, sequence.prompt, sampling.stop)
        self.eager = sequence.streaming or bool(sampling.stop) or sampling.logprobs is not None
        self.tokens: list[Token] = []
        self.pushed = self.text_given = self.tokens_given = self.echoed = 0
        if sampling.prompt_logprobs:
            self.echo = TextStream(tokenizer, [], special=True)
            self._add_prompt_token(None)

    def add_prompt(self, rows_QV: torch.Tensor) -> None:
        """Report the prompt's tokens that these rows predict."""
        first = len(self.tokens)
        predicted = self.sequence.prompt[first : first + len(rows_QV)]
        top = self.sequence.sampling.logprobs or 0
        for likelihood in likelihoods(rows_QV[: len(predicted)], predicted, top):
            self._add_prompt_token(likelihood)

    def add(self, token: int, row_V: torch.Tensor, *, ended: bool) -> FinishReason | None:
        """Add a generated token (`ended`: it is the end of sequence); returns whether and why the sequence ends."""
        sequence = self.sequence
        sequence.generated.append(token)
        if sequence.sampling.logprobs is not None:
            likelihood = likelihoods(row_V[None], [token], sequence.sampling.logprobs)[0]
            self.tokens.append(Token(token, self.echoed + len(self.stream.text), likelihood))
        full = len(sequence.generated) == sequence.sampling.max_tokens
        if self.eager or ended or full:
            self.stream.push(sequence.generated[self.pushed : len(sequence.generated) - ended], last=ended or full)
            self.pushed = len(sequence.generated)
        if self.stream.stopped:
            self.tokens = [t for t in self.tokens if t.offset < self.echoed + len(self.stream.text)]
        return "stop" if ended or self.stream.stopped else "length" if full else None

    def piece(self, finish_reason: FinishReason | None) -> Piece | None:
        """What is new and settled; None if the request wants nothing yet."""
        if finish_reason is None and not self.sequence.streaming:
            return None
        settled = len(self.stream.text) if finish_reason else self.stream.settled
        until = len(self.tokens) if finish_reason else sum(t.offset < self.echoed + settled for t in self.tokens)
        piece = Piece(
            self.stream.text[self.text_given : settled], self.tokens[self.tokens_given : until], finish_reason
        )
        self.text_given, self.tokens_given = max(settled, self.text_given), max(until, self.tokens_given)
        return piece if piece.text or piece.tokens or finish_reason else None

    def _add_prompt_token(self, likelihood: Likelihood | None) -> None:
        token = self.sequence.prompt[len(self.tokens)]
        self.tokens.append(Token(token, len(self.echo.text), likelihood))
        if len(self.tokens) > self.sequence.unwritten:
            self.echo.push([token])
        self.echoed = len(self.echo.text)


class Generator:
    """The sequences in flight, and those that wait for room.

    Args:
        run: computes a step, see `RaggedModel.run`.
        eos: tokens that end a sequence.
    """

    def __init__(self, run: Callable[[Step], torch.Tensor], tokenizer: Any, eos: set[int]) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.eos = eos
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, _Output] = {}
        self._ended: list[int] = []

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its prompt has one token or more."""
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence; one that has ended already is no error."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif self.running.pop(sequence.id, None):
            self._ended.append(sequence.id)

    def step(self) -> list[tuple[Sequence, Piece | SequenceError]]:
        """Compute one step for everyone; returns what the requests are to be told, an error as a sequence's last."""
        told = self._admit()
        if not self.running:
            return told
        spans: list[Span] = []
        budget = STEP_TOKENS
        for output in self.running.values():
            if span := output.sequence.span(budget):
                spans.append(span)
                budget -= len(span.tokens) if output.sequence.read < len(output.sequence.prompt) else 0
        rows_NV = self.run(Step(spans, self._ended))
        self._ended = []
        greedy = rows_NV.argmax(-1).tolist()
        end = 0
        for span in spans:
            begin, end = end, end + span.logits
            output = self.running[span.sequence]
            piece: Piece | SequenceError | None
            try:
                piece = self._advance(output, span, rows_NV[begin:end], greedy[begin:end])
            except Exception as error:
                piece = _failed(output.sequence, error)
            if piece:
                told.append((output.sequence, piece))
                if isinstance(piece, SequenceError) or piece.finish_reason:
                    del self.running[span.sequence]
                    self._ended.append(span.sequence)
        return told

    def _admit(self) -> list[tuple[Sequence, Piece | SequenceError]]:
        """Let those that wait join while there is room; returns those that cannot be served."""
        refused: list[tuple[Sequence, Piece | SequenceError]] = []
        while self.waiting and len(self.running) < RUNNING:
            newcomer = self.waiting.popleft()
            try:
                self.running[newcomer.id] = _Output(newcomer, self.tokenizer)
            except Exception as error:
                refused.append((newcomer, _failed(newcomer, error)))
        return refused

    def _advance(self, output: _Output, span: Span, rows_QV: torch.Tensor, greedy: list[int]) -> Piece | None:
        sequence, sampling = output.sequence, output.sequence.sampling
        if sequence.read < len(sequence.prompt):
            sequence.read += len(span.tokens)
            if sampling.prompt_logprobs:
                output.add_prompt(rows_QV)
            if sequence.read < len(sequence.prompt):
                return None
            sequence.first_token = time.perf_counter()
            if sampling.max_tokens == 0:
                return output.piece("length")
        token = draw(rows_QV[-1], sampling, output.random) if output.random else greedy[-1]
        ended = token in self.eos and not sampling.ignore_eos
        return output.piece(output.add(token, rows_QV[-1], ended=ended))


def _failed(sequence: Sequence, error: Exception) -> SequenceError:
    """What the client is told; the log gets the traceback."""
    logging.getLogger(__name__).error("sequence %d has failed", sequence.id, exc_info=error)
    return SequenceError(f"the server failed on this request: {type(error).__name__}: {error}")

"""Which requests are sent and when, decided before the first is sent: the same seed or trace gives the same bytes.

plan = from_trace(read_trace(path), text, window=2048, fit="scale", name=path.name)
plan = at_rate(5.0, text, requests=300, prompt_tokens=256, output_tokens=32, seed=0)
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from lightship.errors import EvaluationError
from lightship.eval.load.prompts import PromptText
from lightship.eval.load.traces import MOONCAKE_BLOCK_TOKENS, Arrival
from lightship.records import Lengths, Workload

Fit = Literal["clip", "scale"]
Blocks = tuple[tuple[int, int], ...]
"""A prompt's blocks, each a number and its tokens."""
OWN_BLOCKS = 1 << 40
"""Prompts that share nothing are blocks of these numbers; a trace's ids are smaller."""


@dataclass(frozen=True)
class Request:
    """One request: its prompt as token ids, and exactly how many tokens are generated."""

    due: float
    """Seconds after the load's start; of no meaning at fixed concurrency."""
    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True)
class LoadPlan:
    """All requests, in the order of their due times, and what is recorded of them."""

    requests: list[Request]
    about: Workload


def at_concurrency(
    concurrency: int, text: PromptText, requests: int, prompt_tokens: int, output_tokens: int
) -> LoadPlan:
    """`requests` different prompts of one length, to be sent with `concurrency` in flight."""
    if requests < concurrency:
        raise EvaluationError(f"{requests} requests never reach a concurrency of {concurrency}; raise --requests")
    arrivals = [Arrival(0.0, prompt_tokens, output_tokens)] * requests
    return _plan(arrivals, text, arrivals="concurrency", name=f"{concurrency} requests in flight", seconds=None)


def at_rate(
    rate: float, text: PromptText, requests: int, prompt_tokens: int, output_tokens: int, seed: int = 0
) -> LoadPlan:
    """Poisson arrivals: gaps drawn from an exponential distribution of mean 1 / `rate` seconds.

    One seed gives the same gaps at every rate, only faster or slower, so that rates differ by nothing else.
    """
    draw = random.Random(seed)
    gaps = [0.0] + [draw.expovariate(1.0) / rate for _ in range(requests - 1)]
    arrivals = [Arrival(due, prompt_tokens, output_tokens) for due in accumulate(gaps)]
    name = f"Poisson, {rate:g} a second, seed {seed}"
    return _plan(arrivals, text, arrivals="poisson", name=name, seconds=arrivals[-1].due)


def from_trace(
    trace: Sequence[Arrival],
    text: PromptText,
    window: int,
    fit: Fit,
    name: str,
    *,
    factor: float | None = None,
    digest: str | None = None,
) -> LoadPlan:
    """The trace's requests at their times, with lengths that fit `window` tokens.

    `scale` multiplies all lengths, blocks too, by `factor`, or by what makes the longest request fit. Then, or with
    `clip` at once, what is still too long is cut: an answer to half of the window, a prompt to what the answer leaves.

    Raises:
        EvaluationError: the trace has no request left.
    """
    if not trace:
        raise EvaluationError(f"{name}: no request is left; raise --seconds or --requests")
    if fit == "clip":
        factor = 1.0
    elif factor is None:
        factor = min(1.0, window / max(x.prompt_tokens + x.output_tokens for x in trace))
    fitted, clipped = [], [0, 0]
    for x in trace:
        prompt, output = max(1, round(x.prompt_tokens * factor)), max(1, round(x.output_tokens * factor))
        kept_output = min(output, window // 2)
        kept_prompt = min(prompt, window - kept_output)
        clipped[0] += kept_prompt < prompt
        clipped[1] += kept_output < output
        fitted.append(Arrival(x.due, kept_prompt, kept_output, x.blocks))
    return _plan(
        fitted,
        text,
        arrivals="trace",
        name=name,
        seconds=fitted[-1].due,
        factor=factor,
        trace_digest=digest,
        length_factor=factor,
        prompts_clipped=clipped[0],
        outputs_clipped=clipped[1],
        window=window,
    )


def blocks_of(arrival: Arrival, number: int, factor: float) -> Blocks:
    """The blocks of a prompt of `arrival.prompt_tokens` tokens, which were multiplied by `factor`.

    Block i of any prompt ends at the same token, so that equal prefixes stay equal.
    """
    if not arrival.blocks:
        return ((OWN_BLOCKS + number, arrival.prompt_tokens),)
    inner = range(1, len(arrival.blocks))
    ends = [min(round(i * MOONCAKE_BLOCK_TOKENS * factor), arrival.prompt_tokens) for i in inner]
    ends.append(arrival.prompt_tokens)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return tuple((block, size) for block, size in zip(arrival.blocks, sizes, strict=True) if size)


def _plan(
    fitted: Sequence[Arrival],
    text: PromptText,
    *,
    arrivals: Literal["concurrency", "poisson", "trace"],
    name: str,
    seconds: float | None,
    factor: float = 1.0,
    **fields: float | str | int | None,
) -> LoadPlan:
    prompts = [blocks_of(x, number, factor) for number, x in enumerate(fitted)]
    requests = [Request(x.due, text.prompt(blocks), x.output_tokens) for x, blocks in zip(fitted, prompts, strict=True)]
    about = Workload(
        arrivals=arrivals,
        name=name,
        requests=len(requests),
        seconds=seconds,
        prompt_tokens=_lengths([x.prompt_tokens for x in fitted]),
        output_tokens=_lengths([x.output_tokens for x in fitted]),
        repeated_tokens=sum(_repeated(prompts)) / sum(x.prompt_tokens for x in fitted),
        **fields,  # type: ignore[arg-type]
    )
    return LoadPlan(requests, about)


def _repeated(prompts: Sequence[Blocks]) -> Iterator[int]:
    """Tokens of each prompt that lie in blocks which an earlier prompt began with, too."""
    prefixes: dict[tuple[int, tuple[int, int]], int] = {}
    for blocks in prompts:
        known = prefix = 0
        for block in blocks:
            key = (prefix, block)
            known += block[1] if key in prefixes else 0
            prefix = prefixes.setdefault(key, len(prefixes) + 1)
        yield known


def _lengths(tokens: Sequence[int]) -> Lengths:
    import numpy as np

    p50, p90 = np.percentile(tokens, [50, 90]).tolist()
    return Lengths(p50=p50, p90=p90, max=max(tokens), total=sum(tokens))

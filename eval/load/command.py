"""`lightship load`: from its arguments to a report.

lightship load URL --tokenizer DIR --trace conv.csv --seconds 60 --speed 2
lightship load URL --tokenizer DIR --rate 5 --ttft-ms 500 --tpot-ms 50
lightship load URL --tokenizer DIR --sweep --ttft-ms 500 --tpot-ms 50 --against URL
"""

import argparse
import math
import shlex
from collections.abc import Mapping
from typing import TypeVar

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.load.measure import measure
from lightship.eval.load.prompts import PromptText, read_prompt_text
from lightship.eval.load.saturation import SweepSettings, sweep
from lightship.eval.load.sglang_client import SglangLoad, run_sglang_client
from lightship.eval.load.traces import cut, read_trace
from lightship.eval.load.workload import Fit, LoadPlan, at_concurrency, at_rate, from_trace
from lightship.files import digest_of_file
from lightship.records import LoadReport, Slo, SweepReport

T = TypeVar("T")
SECONDS = 60.0
STEP_SECONDS = 20.0
REQUESTS_IN_FLIGHT = 8
"""At fixed concurrency, requests for each one in flight."""
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 32
WARMUP_REQUESTS = 2
USES = {
    "seconds": {"rate", "trace", "sweep rate", "rate sglang"},
    "requests": {"concurrency", "rate", "trace", "concurrency sglang", "rate sglang"},
    "speed": {"trace"},
    "fit": {"trace"},
    "factor": {"trace"},
    "window": {"trace"},
    "prompt_tokens": {"concurrency", "rate", "sweep concurrency", "sweep rate", "concurrency sglang", "rate sglang"},
    "output_tokens": {"concurrency", "rate", "sweep concurrency", "sweep rate", "concurrency sglang", "rate sglang"},
    "text": {"concurrency", "rate", "trace", "sweep concurrency", "sweep rate"},
    "share": {"sweep concurrency", "sweep rate"},
    "start": {"sweep concurrency", "sweep rate"},
    "most": {"sweep concurrency", "sweep rate"},
    "seed": {"rate", "sweep rate", "concurrency sglang", "rate sglang"},
    "warmup_requests": {"concurrency", "rate", "trace", "concurrency sglang", "rate sglang"},
    "warmup_seconds": {"concurrency", "rate", "trace", "sweep rate"},
}
"""The kinds of load for which an option does something."""


def run_load(servers: Mapping[str, Endpoint], arguments: argparse.Namespace) -> LoadReport | SweepReport:
    """Make the load that the arguments ask for; the servers in their order, the last one being judged.

    Raises:
        LightshipError: an option does nothing for this kind of load, the warm-up leaves no request, the trace or text
            cannot be read, the requests do not fit the model, or a server answers nothing.
    """
    if arguments.share is not None and arguments.share > 1:
        raise EvaluationError(f"--share {arguments.share:g} is more than all requests; give at most 1")
    if arguments.factor and arguments.fit != "scale":
        raise EvaluationError("--factor scales lengths; give --fit scale with it")
    slo = Slo(ttft_ms=arguments.ttft_ms, tpot_ms=arguments.tpot_ms) if arguments.ttft_ms or arguments.tpot_ms else None
    if arguments.sglang and (not (arguments.concurrency or arguments.rate) or len(servers) > 1):
        raise EvaluationError("SGLang's client is used with --concurrency or --rate, on one server; leave --sglang out")
    _check_uses(arguments, slo)
    if arguments.sglang:
        return _by_sglang(servers, arguments, slo)
    tokenizer = next(iter(servers.values())).tokenizer
    if not arguments.trace:
        _check_lengths(servers, arguments)
    text = read_prompt_text(arguments.text, tokenizer)
    if arguments.sweep:
        return sweep(servers, text, _sweep_settings(arguments, slo))
    return measure(
        servers,
        _plan(servers, text, arguments),
        slo,
        concurrency=arguments.concurrency,
        warmup_requests=_given(arguments.warmup_requests, WARMUP_REQUESTS),
        warmup_seconds=arguments.warmup_seconds or 0.0,
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _check_uses(arguments: argparse.Namespace, slo: Slo | None) -> None:
    if arguments.sweep:
        kind, shown = f"sweep {arguments.sweep}", f"--sweep {arguments.sweep}"
    else:
        kind = next(name for name in ("concurrency", "rate", "trace") if getattr(arguments, name))
        shown = f"--{kind}"
    if arguments.sglang:
        kind, shown = f"{kind} sglang", f"{shown} and --sglang"
    for name, kinds in USES.items():
        if getattr(arguments, name) is not None and kind not in kinds:
            raise EvaluationError(f"--{name.replace('_', '-')} does nothing with {shown}; leave it out")
    if arguments.share is not None and slo is None:
        raise EvaluationError("--share is of the requests within limits; give --ttft-ms or --tpot-ms with it")


def _lengths(arguments: argparse.Namespace) -> tuple[int, int]:
    """Tokens of a prompt and of an answer."""
    return _given(arguments.prompt_tokens, PROMPT_TOKENS), _given(arguments.output_tokens, OUTPUT_TOKENS)


def _plan(servers: Mapping[str, Endpoint], text: PromptText, arguments: argparse.Namespace) -> LoadPlan:
    if arguments.trace:
        window = arguments.window or _context_of(servers)
        if window is None:
            raise EvaluationError("the server does not say its context; give --window TOKENS")
        speed = arguments.speed or 1.0
        arrivals = cut(read_trace(arguments.trace), speed, arguments.seconds or SECONDS, arguments.requests)
        name, digest = f"{arguments.trace.name} at speed {speed:g}", digest_of_file(arguments.trace)
        fit: Fit = arguments.fit or "clip"
        return from_trace(arrivals, text, window, fit, name, factor=arguments.factor, digest=digest)
    if arguments.concurrency:
        requests = arguments.requests or REQUESTS_IN_FLIGHT * arguments.concurrency
        return at_concurrency(arguments.concurrency, text, requests, *_lengths(arguments))
    requests = arguments.requests or math.ceil(arguments.rate * (arguments.seconds or SECONDS))
    return at_rate(arguments.rate, text, requests, *_lengths(arguments), arguments.seed or 0)


def _sweep_settings(arguments: argparse.Namespace, slo: Slo | None) -> SweepSettings:
    prompt_tokens, output_tokens = _lengths(arguments)
    return SweepSettings(
        unit="requests a second" if arguments.sweep == "rate" else "requests in flight",
        slo=slo,
        share=arguments.share or SweepSettings.share,
        seconds=arguments.seconds or STEP_SECONDS,
        warmup_seconds=_given(arguments.warmup_seconds, SweepSettings.warmup_seconds),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        start=arguments.start or SweepSettings.start,
        most=arguments.most or math.inf,
        seed=arguments.seed or 0,
    )


def _by_sglang(servers: Mapping[str, Endpoint], arguments: argparse.Namespace, slo: Slo | None) -> LoadReport:
    prompt_tokens, output_tokens = _lengths(arguments)
    load = SglangLoad(
        requests=arguments.requests
        or math.ceil(
            REQUESTS_IN_FLIGHT * arguments.concurrency
            if arguments.concurrency
            else arguments.rate * (arguments.seconds or SECONDS)
        ),
        concurrency=arguments.concurrency,
        rate=arguments.rate,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        warmup_requests=_given(arguments.warmup_requests, WARMUP_REQUESTS),
        seed=arguments.seed or 0,
    )
    [endpoint] = servers.values()
    return run_sglang_client(endpoint, load, slo, shlex.split(arguments.sglang))


def _context_of(servers: Mapping[str, Endpoint]) -> int | None:
    """The smallest context that a server says it has."""
    return min((x.context_tokens for x in servers.values() if x.context_tokens), default=None)


def _check_lengths(servers: Mapping[str, Endpoint], arguments: argparse.Namespace) -> None:
    tokens, context = sum(_lengths(arguments)), _context_of(servers)
    if context is not None and tokens > context:
        raise EvaluationError(
            f"--prompt-tokens and --output-tokens are {tokens} together, more than the model's context of {context}; "
            "lower one"
        )

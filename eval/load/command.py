"""`lightship load`: from its arguments to a report.

lightship load URL --tokenizer DIR --trace conv.csv --seconds 60 --speed 2
lightship load URL --tokenizer DIR --rate 5 --ttft-ms 500 --tpot-ms 50
lightship load URL --tokenizer DIR --sweep --ttft-ms 500 --tpot-ms 50 --against URL
"""

import argparse
import math
import shlex
from collections.abc import Mapping

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.load.measure import measure
from lightship.eval.load.prompts import PromptText, read_prompt_text
from lightship.eval.load.saturation import SweepSettings, sweep
from lightship.eval.load.sglang_client import SglangLoad, run_sglang_client
from lightship.eval.load.traces import cut, read_trace
from lightship.eval.load.workload import LoadPlan, at_concurrency, at_rate, from_trace
from lightship.files import digest_of_file
from lightship.records import LoadReport, Slo, SweepReport

SECONDS = 60.0
STEP_SECONDS = 20.0
REQUESTS_IN_FLIGHT = 8
"""At fixed concurrency, requests for each one in flight."""


def run_load(servers: Mapping[str, Endpoint], arguments: argparse.Namespace) -> LoadReport | SweepReport:
    """Make the load that the arguments ask for; the servers in their order, the last one being judged.

    Raises:
        LightshipError: the trace or text cannot be read, the requests do not fit the model, or a server
            answers nothing.
    """
    if arguments.share > 1:
        raise EvaluationError(f"--share {arguments.share:g} is more than all requests; give at most 1")
    if arguments.factor and arguments.fit != "scale":
        raise EvaluationError("--factor scales lengths; give --fit scale with it")
    slo = Slo(ttft_ms=arguments.ttft_ms, tpot_ms=arguments.tpot_ms) if arguments.ttft_ms or arguments.tpot_ms else None
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
        warmup_requests=arguments.warmup_requests,
        warmup_seconds=arguments.warmup_seconds,
    )


def _plan(servers: Mapping[str, Endpoint], text: PromptText, arguments: argparse.Namespace) -> LoadPlan:
    lengths = arguments.prompt_tokens, arguments.output_tokens
    if arguments.trace:
        window = arguments.window or _context_of(servers)
        if window is None:
            raise EvaluationError("the server does not say its context; give --window TOKENS")
        arrivals = cut(read_trace(arguments.trace), arguments.speed, arguments.seconds or SECONDS, arguments.requests)
        name, digest = f"{arguments.trace.name} at speed {arguments.speed:g}", digest_of_file(arguments.trace)
        return from_trace(arrivals, text, window, arguments.fit, name, factor=arguments.factor, digest=digest)
    if arguments.concurrency:
        requests = arguments.requests or REQUESTS_IN_FLIGHT * arguments.concurrency
        return at_concurrency(arguments.concurrency, text, requests, *lengths)
    requests = arguments.requests or math.ceil(arguments.rate * (arguments.seconds or SECONDS))
    return at_rate(arguments.rate, text, requests, *lengths, arguments.seed)


def _sweep_settings(arguments: argparse.Namespace, slo: Slo | None) -> SweepSettings:
    return SweepSettings(
        unit="requests a second" if arguments.sweep == "rate" else "requests in flight",
        slo=slo,
        share=arguments.share,
        seconds=arguments.seconds or STEP_SECONDS,
        warmup_seconds=arguments.warmup_seconds,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        start=arguments.start,
        most=arguments.most or math.inf,
        seed=arguments.seed,
    )


def _by_sglang(servers: Mapping[str, Endpoint], arguments: argparse.Namespace, slo: Slo | None) -> LoadReport:
    if not (arguments.concurrency or arguments.rate) or len(servers) > 1:
        raise EvaluationError("SGLang's client is used with --concurrency or --rate, on one server; leave --sglang out")
    load = SglangLoad(
        requests=arguments.requests
        or math.ceil(
            REQUESTS_IN_FLIGHT * arguments.concurrency
            if arguments.concurrency
            else arguments.rate * (arguments.seconds or SECONDS)
        ),
        concurrency=arguments.concurrency,
        rate=arguments.rate,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        warmup_requests=arguments.warmup_requests,
        seed=arguments.seed,
    )
    [endpoint] = servers.values()
    return run_sglang_client(endpoint, load, slo, shlex.split(arguments.sglang))


def _context_of(servers: Mapping[str, Endpoint]) -> int | None:
    """The smallest context that a server says it has."""
    return min((x.context_tokens for x in servers.values() if x.context_tokens), default=None)


def _check_lengths(servers: Mapping[str, Endpoint], arguments: argparse.Namespace) -> None:
    tokens, context = arguments.prompt_tokens + arguments.output_tokens, _context_of(servers)
    if context is not None and tokens > context:
        raise EvaluationError(
            f"--prompt-tokens and --output-tokens are {tokens} together, more than the model's context of {context}; "
            "lower one"
        )

"""SGLang's own benchmark client, run as its users run it, and its result in our records.

    run_sglang_client(endpoint, SglangLoad(concurrency=64, requests=256), slo, launcher=["python3"])

It knows fixed concurrency and Poisson arrivals; its prompts are random token ids. Its replay of Mooncake's trace keeps
the times and the answers' lengths, but not the prompts' (about 128 words a block of 512 tokens), so traces are replayed
by us.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.load.client import Sample
from lightship.eval.load.figures import figures_of_time
from lightship.eval.machine import describe_machine
from lightship.records import Lengths, LoadReport, ServerFigures, Slo, Workload

MODULE = "sglang.benchmark.serving"
"""SGLang 0.5.17 has it; `sglang.bench_serving` is its older name."""
RUN_SECONDS = 3600
SAID_LINES = 15
FIELDS = ("duration", "input_lens", "output_lens", "ttfts", "itls", "errors")
"""Of a line of its output file that are read; those after the first come with `--output-details`."""


@dataclass(frozen=True)
class SglangLoad:
    """A load that SGLang's client can make: `concurrency` in flight, or `rate` a second, Poisson."""

    requests: int = 100
    concurrency: int | None = None
    rate: float | None = None
    prompt_tokens: int = 256
    output_tokens: int = 32
    warmup_requests: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        assert (self.concurrency is None) != (self.rate is None), "exactly one of concurrency and rate"


def command_of(launcher: Sequence[str], endpoint: Endpoint, load: SglangLoad, output_file: Path) -> list[str]:
    """The client's command line. The API key is not on it: the client reads `OPENAI_API_KEY`.

    Args:
        launcher: a Python with SGLang: `["python3"]`, or `["docker", "exec", "NAME", "python3"]`.
        output_file: a JSON line is appended to it; a container must see it at the same path.
    """
    arrivals = ["--max-concurrency", str(load.concurrency)] if load.concurrency else ["--request-rate", str(load.rate)]
    return [
        *(*launcher, "-m", MODULE, "--backend", "sglang", "--base-url", endpoint.base_url),
        *("--model", str(endpoint.tokenizer), "--tokenizer", str(endpoint.tokenizer)),
        *("--served-model-name", endpoint.model, "--dataset-name", "random-ids", "--tokenize-prompt"),
        *("--random-input-len", str(load.prompt_tokens), "--random-output-len", str(load.output_tokens)),
        *("--random-range-ratio", "1.0", "--num-prompts", str(load.requests), *arrivals),
        *("--seed", str(load.seed), "--warmup-requests", str(load.warmup_requests), "--disable-tqdm"),
        *("--output-details", "--output-file", str(output_file)),
    ]


def run_sglang_client(
    endpoint: Endpoint, load: SglangLoad, slo: Slo | None = None, launcher: Sequence[str] = (sys.executable,)
) -> LoadReport:
    """Run the client against a running SGLang server and read what it measured.

    Raises:
        EvaluationError: SGLang is not installed there, the client fails, or it answers no request.
    """
    with tempfile.TemporaryDirectory() as folder:
        output_file = Path(folder) / "result.jsonl"
        command = command_of(launcher, endpoint, load, output_file)
        environment = os.environ | ({"OPENAI_API_KEY": endpoint.api_key} if endpoint.api_key else {})
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, errors="replace"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EvaluationError(f"SGLang's client cannot be run: {error}; name a Python with SGLang") from error
        if done.returncode or not output_file.is_file():
            said = "\n".join(f"  | {line}" for line in (done.stdout + done.stderr).splitlines()[-SAID_LINES:])
            raise EvaluationError(
                f"SGLang's client ended with exit code {done.returncode} and no result\n"
                f"  command: {' '.join(command)}\n"
                f"{said}\nname a Python with SGLang 0.5.17 or newer; a container must see {folder} at this path"
            )
        return report_of(output_file, endpoint, load, slo)


def report_of(output_file: Path, endpoint: Endpoint, load: SglangLoad, slo: Slo | None = None) -> LoadReport:
    """The last line of the client's output file, as a report.

    Raises:
        EvaluationError: it is not a result with details, or no request was answered.
    """
    try:
        # Python's own reader: the client writes an endless rate as `Infinity`, which is not JSON.
        result = json.loads(output_file.read_text(encoding="utf-8").splitlines()[-1])
        missing = [name for name in FIELDS if name not in result]
    except (OSError, ValueError, IndexError) as error:
        raise EvaluationError(f"{output_file} is not an output file of SGLang's client: {error}") from error
    if missing:
        raise EvaluationError(f"{output_file} lacks {', '.join(missing)}; it must be written with --output-details")
    samples = [*_samples(result, load.output_tokens)]
    where = f"the server {endpoint.base_url}, asked by SGLang's client,"
    fields = figures_of_time(samples, result["duration"], where, slo)
    name = f"{load.concurrency} requests in flight" if load.concurrency else f"Poisson, {load.rate:g} a second"
    return LoadReport(
        client="sglang",
        workload=Workload(
            arrivals="concurrency" if load.concurrency else "poisson",
            name=f"{name}, seed {load.seed}",
            requests=len(samples),
            seconds=None,
            prompt_tokens=_lengths(load.prompt_tokens, len(samples)),
            output_tokens=_lengths(load.output_tokens, len(samples)),
            repeated_tokens=0.0,
        ),
        servers=[ServerFigures(server=endpoint.base_url, **fields, warmup_requests=load.warmup_requests)],
        machine=describe_machine(),
        date=datetime.now(UTC).date().isoformat(),
    )


def _samples(result: dict[str, Any], asked: int) -> list[Sample]:
    """A sample for each request; the client does not say when it began, so it begins at 0."""
    samples = []
    rows = zip(*(result[name] for name in FIELDS[1:]), strict=True)
    for prompt_tokens, generated, first, gaps, error in rows:
        sample = Sample(None, asked, prompt_tokens=prompt_tokens, generated=generated)
        if error:
            sample.fail("failed", error)
        elif not first:
            sample.fail("empty answer", "the stream ended without a token")
        else:
            sample.arrivals, sample.done = list(accumulate(gaps, initial=first)), True
        samples.append(sample)
    return samples


def _lengths(tokens: int, requests: int) -> Lengths:
    return Lengths(p50=tokens, p90=tokens, max=tokens, total=tokens * requests)

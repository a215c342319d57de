"""SGLang's client: the command it is run by, and its output file read into our record. It is not run here itself.

The field names of a result are those of SGLang 0.5.17, `sglang/benchmark/serving.py`.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lightship.endpoint import Endpoint
from lightship.errors import EvaluationError
from lightship.eval.load.sglang_client import SglangLoad, command_of, report_of, run_sglang_client
from lightship.records import Slo

ENDPOINT = Endpoint("http://127.0.0.1:30000", "served-name", Path("/models/demo"), api_key="s3cret")
LOAD = SglangLoad(requests=3, concurrency=2, prompt_tokens=16, output_tokens=3, warmup_requests=1)
RESULT: dict[str, Any] = {
    "tag": None,
    "backend": "sglang",
    "dataset_name": "random-ids",
    "request_rate": float("inf"),
    "max_concurrency": 2,
    "random_input_len": 16,
    "random_output_len": 3,
    "random_range_ratio": 1.0,
    "server_info": {"internal_states": [{"avg_spec_accept_length": None}]},
    "duration": 2.0,
    "completed": 2,
    "total_input_tokens": 32,
    "total_output_tokens": 6,
    "request_throughput": 1.0,
    "input_throughput": 16.0,
    "output_throughput": 3.0,
    "median_ttft_ms": 150.0,
    "p99_ttft_ms": 199.0,
    "median_tpot_ms": 25.0,
    "median_e2e_latency_ms": 200.0,
    "concurrency": 1.0,
    "accept_length": None,
    "input_lens": [16, 16, 16],
    "output_lens": [3, 3, 0],
    "ttfts": [0.1, 0.2, 0.0],
    "itls": [[0.02, 0.02], [0.03, 0.03], []],
    "generated_texts": ["a", "b", ""],
    "errors": ["", "", "Service Unavailable: busy"],
}


def write(path: Path, *results: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(result) + "\n" for result in results))
    return path


def test_the_command_asks_for_the_load_with_details_and_hides_the_key() -> None:
    command = command_of(["docker", "exec", "sgl", "python3"], ENDPOINT, LOAD, Path("/tmp/out.jsonl"))
    assert command[:6] == ["docker", "exec", "sgl", "python3", "-m", "sglang.benchmark.serving"]
    options = dict(pairwise(command))
    assert options["--base-url"] == "http://127.0.0.1:30000"
    assert (options["--served-model-name"], options["--tokenizer"]) == ("served-name", "/models/demo")
    assert (options["--random-input-len"], options["--random-output-len"]) == ("16", "3")
    assert (options["--num-prompts"], options["--max-concurrency"]) == ("3", "2")
    assert options["--output-file"] == "/tmp/out.jsonl"
    assert "--output-details" in command
    assert "--request-rate" not in command
    assert "s3cret" not in " ".join(command)


def test_a_rate_is_asked_for_as_poisson_arrivals() -> None:
    command = command_of(["python3"], ENDPOINT, SglangLoad(requests=3, rate=2.5), Path("out"))
    assert dict(pairwise(command))["--request-rate"] == "2.5"
    assert "--max-concurrency" not in command


def test_a_result_becomes_the_same_record_as_our_own(tmp_path: Path) -> None:
    report = report_of(write(tmp_path / "r.jsonl", {"old": 1}, RESULT), ENDPOINT, LOAD, Slo(ttft_ms=150))
    [found] = report.servers
    assert (report.client, report.workload.arrivals) == ("sglang", "concurrency")
    assert (found.requests, found.errors, found.errors_by_kind) == (3, 1, {"failed": 1})
    assert found.queries_per_minute == pytest.approx(60 * RESULT["request_throughput"])
    assert found.output_tokens_per_second == pytest.approx(RESULT["output_throughput"])
    assert found.input_tokens_per_second == pytest.approx(RESULT["input_throughput"])
    assert found.time_to_first_token_ms.p50 == pytest.approx(RESULT["median_ttft_ms"])
    assert found.time_to_first_token_ms.p99 == pytest.approx(RESULT["p99_ttft_ms"])
    assert found.time_per_output_token_ms.p50 == pytest.approx(RESULT["median_tpot_ms"])
    assert found.end_to_end_ms is not None
    assert found.end_to_end_ms.p50 == pytest.approx(RESULT["median_e2e_latency_ms"])
    assert found.goodput is not None
    assert found.goodput.share == pytest.approx(1 / 3)
    assert found.lateness_ms is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an output file"),
        ("{", "is not an output file"),
        ('{"duration": 1}', "lacks input_lens, .*--output"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        report_of(tmp_path / "r.jsonl", ENDPOINT, LOAD)


def test_the_client_is_run_with_the_key_in_its_environment_and_its_file_is_read(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "assert os.environ['OPENAI_API_KEY'] == 's3cret'\n"
        f"result = json.loads({json.dumps(json.dumps(RESULT))})\n"
        "open(sys.argv[sys.argv.index('--output-file') + 1], 'a').write(json.dumps(result) + '\\n')\n"
    )
    script.chmod(0o755)
    assert run_sglang_client(ENDPOINT, LOAD, launcher=[str(script)]).servers[0].requests == 3


def test_a_python_without_sglang_is_named_with_its_words(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho No module named sglang >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(EvaluationError, match=r"exit code 1(.|\n)*No module named sglang(.|\n)*Python with SGLang"):
        run_sglang_client(ENDPOINT, LOAD, launcher=[str(script)])
    with pytest.raises(EvaluationError, match="cannot be run"):
        run_sglang_client(ENDPOINT, LOAD, launcher=[str(tmp_path / "gone")])

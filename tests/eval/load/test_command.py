"""`lightship load` on a server that is known by its URL: every kind of load, as a table and as a record."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightship.cli import parser
from lightship.files import read_json
from lightship.records import LoadReport, SweepReport
from tests.eval.stub_server import Stub, serving

TRACE = "\n".join(
    json.dumps({"timestamp": 100 * i, "input_length": 600, "output_length": 40, "hash_ids": [0, i + 1]})
    for i in range(5)
)


def load(stub: Stub, tmp_path: Path, *arguments: str) -> tuple[int, Path]:
    out = tmp_path / "report.json"
    url, tokenizer = stub.endpoint.base_url, str(stub.endpoint.tokenizer)
    parsed = parser().parse_args(["load", url, "--tokenizer", tokenizer, "--out", str(out), *arguments])
    return parsed.run(parsed), out


def test_a_trace_is_replayed_within_the_servers_own_window(tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "t.jsonl").write_text(TRACE)
    with serving(tokenizer, context_tokens=160) as stub:
        code, out = load(stub, tmp_path, "--trace", str(tmp_path / "t.jsonl"), "--speed", "2", "--fit", "scale")
    report = read_json(out, LoadReport)
    assert code == 0
    assert [len(b["prompt"]) for b in stub.bodies] == [150] * 5
    assert report.workload.length_factor == pytest.approx(0.25)
    assert report.workload.repeated_tokens == pytest.approx(4 * 128 / 750)
    assert report.workload.seconds == pytest.approx(0.2)
    assert report.workload.trace_digest is not None
    assert "68% of the prompt tokens repeat an earlier prefix" in capsys.readouterr().out


def test_a_rate_has_goodput_and_drops_its_warm_up(tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    rate = [
        "--rate",
        "50",
        "--requests",
        "20",
        "--prompt-tokens",
        "8",
        "--output-tokens",
        "3",
        "--warmup-requests",
        "5",
    ]
    with serving(tokenizer) as stub:
        _, out = load(stub, tmp_path, *rate, "--ttft-ms", "5000")
    [found] = read_json(out, LoadReport).servers
    assert (found.requests, found.warmup_requests, len(stub.bodies)) == (15, 5, 20)
    assert found.goodput is not None
    assert found.goodput.share == 1
    assert "sent late p50 / p99 / most ms" in capsys.readouterr().out


def test_two_servers_get_the_same_requests_and_a_ratio(tokenizer: Path, tmp_path: Path) -> None:
    with serving(tokenizer, seconds_per_token=0.02) as slow, serving(tokenizer, seconds_per_token=0.01) as fast:
        arguments = ["--concurrency", "2", "--requests", "8", "--output-tokens", "4"]
        _, out = load(fast, tmp_path, *arguments, "--against", slow.endpoint.base_url)
    report = read_json(out, LoadReport)
    assert sorted(b["prompt"] for b in slow.bodies) == sorted(b["prompt"] for b in fast.bodies)
    assert [x.server for x in report.servers] == [slow.endpoint.base_url, fast.endpoint.base_url]
    ratio = report.ratio()
    assert ratio is not None
    assert 1.3 < ratio < 2.6


def test_a_sweep_writes_its_steps(tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    with serving(tokenizer) as stub:
        arguments = ["--sweep", "concurrency", "--most", "2", "--ttft-ms", "5000", "--output-tokens", "2"]
        _, out = load(stub, tmp_path, *arguments)
    report = read_json(out, SweepReport)
    assert [s.load for s in report.servers[0].steps] == [1, 2]
    assert (report.servers[0].highest, report.servers[0].refused) == (2, None)
    assert "sustains 2 requests in flight, the sweep's end" in capsys.readouterr().out


def test_the_key_comes_from_a_file_or_the_environment(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("from-file\n")
    one = ["--concurrency", "1", "--requests", "1", "--output-tokens", "2"]
    with serving(tokenizer) as stub:
        load(stub, tmp_path, *one, "--api-key-file", str(tmp_path / "key"))
        assert set(stub.keys) == {"Bearer from-file"}
        monkeypatch.setenv("LIGHTSHIP_API_KEY", "from-environment")
        load(stub, tmp_path, *one)
    assert stub.keys[-1] == "Bearer from-environment"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1", "--prompt-tokens", "200"], "232 together, more than the model's context of 160"),
        (["--trace", "gone.csv"], "gone.csv cannot be read"),
        (["--sweep", "--share", "90"], "--share 90 is more than all requests"),
        (["--trace", "t.csv", "--factor", "0.5"], "give --fit scale with it"),
        (["--sweep", "--sglang", "python3"], "with --concurrency or --rate"),
        (["--rate", "1", "--api-key-file", "gone.key"], "the file gone.key of --api-key-file cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_request(
    tokenizer: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    from lightship.errors import LightshipError

    with serving(tokenizer, context_tokens=160) as stub, pytest.raises(LightshipError, match=message):
        load(stub, tmp_path, *arguments)
    assert not stub.bodies


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_a_rate_that_is_none_is_refused_by_the_command_line(value: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["load", "http://x", "--tokenizer", "t", "--rate", value])
    assert "is not a number above 0" in capsys.readouterr().err

"""Two releases held against each other: what differs, which way it went, and what the terminal shows of it."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from lightship.contrast import ReleaseSide, better_when, contrast
from lightship.contrast_tables import answers_sentence, contrast_view, number
from lightship.errors import LightshipError
from lightship.eval.comparison import compare
from lightship.release import find_releases
from lightship.tracking import Tracker
from tests.commands import lightship, refusal
from tests.eval.many_releases import finish_release
from tests.eval.release import accuracy


def side(**metrics: float) -> ReleaseSide:
    return ReleaseSide(
        release_id="aaaa", name="m-aaaa", verdict="pass", promoted="no", created="2026-11-25T10:00:00+00:00",
        settings={"quantization.method": "gptq"}, metrics=metrics,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two releases, the first of them the champion."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracker = Tracker.connect(folder)
        for n in (0, 1):
            finish_release(folder, tracker, n, questions=200, promote=n == 0)
        yield folder


def ids(home: Path) -> tuple[str, str]:
    """The champion and the other."""
    champion = Tracker.connect(home).champion_release("lightship-demo")
    (other,) = {p.name for p in (home / "releases").iterdir()} - {champion}
    assert champion is not None
    return champion, other


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("accuracy", "more"), ("accuracy/math", "more"), ("accuracy_loss_high", "less"), ("fidelity/kl", "less"),
        ("fidelity/prose/kl", "less"), ("throughput/quantized/c8/ttft_p50_ms", "less"), ("throughput/ratio/c8", "more"),
        ("throughput/quantized/c8/queries_per_minute", "more"), ("verify/error_w13", "less"),
        ("calibration/output_error_w2", "less"), ("task/gsm8k/exact_match/strict", "more"),
        ("task/gsm8k/truncated", "less"), ("size/bytes_after", "less"), ("size/bytes_before", None),
        ("source/accuracy", None), ("throughput/source/c8/ttft_p50_ms", None), ("accuracy_loss_p_value", None),
    ],
)  # fmt: skip
def test_the_name_of_a_metric_says_which_way_is_better(metric: str, wanted: str | None) -> None:
    assert better_when(metric) == wanted


def test_a_metric_has_its_difference_and_direction_or_neither_if_one_lacks_it() -> None:
    held = contrast(side(accuracy=0.8, truncated=0.1, **{"fidelity/kl": 0.02}), side(accuracy=0.7, truncated=0.1))
    found = {m.name: (m.difference, m.direction) for m in held.metrics}
    assert found["accuracy"] == (pytest.approx(-0.1), "worse")
    assert found["truncated"] == (0, "same")
    assert found["fidelity/kl"] == (None, "other")


def test_metrics_of_few_requests_in_flight_come_before_those_of_many() -> None:
    names = [f"throughput/ratio/c{c}" for c in (16, 4, 1)]
    held = contrast(side(**dict.fromkeys(names, 1.0)), side())
    assert [m.name for m in held.metrics] == names[::-1]


@pytest.mark.parametrize(
    ("right", "said"), [(100, "B is worse"), (198, "no difference is shown"), (200, "no difference is shown")]
)
def test_only_the_interval_of_the_answers_says_that_one_is_worse(right: int, said: str) -> None:
    first, second = accuracy([True] * 200), accuracy([i < right for i in range(200)])
    assert answers_sentence(compare(first, second)).rpartition(": ")[2].strip() in (said, f"[red]{said}[/]")


@pytest.mark.parametrize(
    ("value", "signed", "said"),
    [
        (71_312_222, False, "71.31M"), (366.2e9, False, "366.2G"), (32_768, False, "32,768"),
        (0.84321, False, "0.8432"), (-0.00421, True, "-0.00421"), (1234, True, "+1,234"), (0, False, "0"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, signed: bool, said: str) -> None:
    assert number(value, signed) == said


@pytest.mark.parametrize("width", [80, 120])
def test_two_releases_fit_the_terminal_and_no_line_is_cut(home: Path, width: int) -> None:
    first, second = Tracker.connect(home).sides(list(ids(home)))
    held = contrast(first, second)
    console = Console(file=io.StringIO(), width=width)
    console.print(contrast_view(held))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert "…" not in shown
    rows = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert all(metric.name.partition("/")[2] in shown for metric in held.metrics)
    assert {"A", "B", "setting", "metric"} <= set(rows)


def test_compare_shows_verdicts_settings_answers_and_metrics(home: Path) -> None:
    champion, other = ids(home)
    done = lightship("compare", other[:4], "champion", "--home", home)
    assert done.returncode == 0, done.stderr
    assert champion in done.stdout
    assert "answers in pairs: A" in done.stdout
    for said in ("quantization.method", "fidelity", "B - A", "now", "subject"):
        assert said in done.stdout
    assert "by_layer" not in done.stdout


def test_compare_as_json_holds_both_releases_and_their_answers(home: Path) -> None:
    champion, other = ids(home)
    held = json.loads(lightship("compare", other, champion, "--json", "--home", home).stdout)
    assert (held["first"]["release_id"], held["second"]["promoted"]) == (other, "champion")
    assert held["answers"]["questions"] == 200
    assert {"name": "quantization.method", "first": "mse", "second": "gptq"} in held["settings"]


def test_compare_without_releases_shows_each_in_a_row(home: Path) -> None:
    shown = lightship("compare", "--home", home).stdout
    for release in ids(home):
        assert sum(line.startswith(release) for line in shown.splitlines()) == 1
    assert shown.index(ids(home)[1]) < shown.index(ids(home)[0]), "the newest is first"


def test_a_release_without_records_is_compared_by_its_run_alone(home: Path) -> None:
    champion, other = ids(home)
    accuracy_file = home / "releases" / other / "accuracy.json"
    kept = accuracy_file.read_bytes()
    accuracy_file.unlink()
    try:
        shown = lightship("compare", other, champion, "--home", home).stdout
    finally:
        accuracy_file.write_bytes(kept)
    assert "answers are not paired" in shown
    assert "B - A" in shown


def test_a_champion_that_is_not_there_is_named(home: Path, tmp_path: Path) -> None:
    class NoChampion:
        def champion_release(self, _: str) -> str | None:
            return None

    with pytest.raises(LightshipError, match="lightship-demo has no champion yet"):
        find_releases(home, ["champion"], NoChampion())
    assert "no release in" in refusal("compare", "ffff", "champion", "--home", tmp_path)

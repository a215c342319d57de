"""The report holds what the records say, escapes what a model wrote, and asks the network for nothing."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from lightship.eval import drawing, plots
from lightship.eval.receipt import make_receipt
from lightship.eval.report import HEADLINES, write_report
from lightship.eval.report_style import CSS
from lightship.records import Accuracy, Check, TaskResult
from tests.eval.release import calibration, release

VOID = {"meta", "br", "rect", "line", "circle", "path", "polyline"}


class Balance(HTMLParser):
    """Fails on an element that is not closed, or closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, _: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def written(tmp_path: Path, **changes: object) -> str:
    write_report(tmp_path / "report.html", replace(release(), **changes))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours `#rrggbb`."""

    def luminance(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_report_is_well_formed_and_shows_every_rule_figure_and_identity(tmp_path: Path) -> None:
    page = written(tmp_path)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    data = release()
    assert HEADLINES[data.verdict.decision] in page
    assert page.count("<figure>") == 8
    for said in (data.release_id, data.source_digest, data.quantized.manifest_digest, *data.next_commands):
        assert said in page
    for rule in data.verdict.rules:
        assert rule.value in page


def test_the_report_says_how_often_the_two_models_agree(tmp_path: Path) -> None:
    page = written(tmp_path, agreement=msgspec.structs.replace(release().agreement, same_text=0.625))
    assert "the same text to 62.5 %" in page


def test_further_tasks_stand_beside_the_questions(tmp_path: Path) -> None:
    def with_task(accuracy: Accuracy, value: float) -> Accuracy:
        result = TaskResult(task="gsm8k", metrics={"exact_match/strict-match": value}, samples=[], overrides={})
        return msgspec.structs.replace(accuracy, tasks=[result])

    data = release()
    page = written(
        tmp_path,
        source_accuracy=with_task(data.source_accuracy, 0.9),
        quantized_accuracy=with_task(data.quantized_accuracy, 0.875),
    )
    assert re.search(r"gsm8k<small>exact_match/strict-match, 0 documents</small>.*90.0 %.*87.5 %.*−2.50 points", page)


def test_nothing_is_fetched_from_the_network(tmp_path: Path) -> None:
    page = written(tmp_path).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"\b(src|href)=|@import|url\(|<script|<link|https?://", page)


def test_what_a_model_wrote_cannot_become_markup(tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script>(B)"
    data = release(text=attack)
    staged = msgspec.structs.replace(data.staged, greeting=attack)
    write_report(tmp_path / "report.html", replace(data, staged=staged, source="<b>demo", next_commands=["<i>"]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;(B)" in page
    assert not re.search("<script|<b>|<i>", page)


def test_ten_lost_questions_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    lost = release().comparison.lost
    assert len(lost) > 10
    page = written(tmp_path)
    assert page.count("<details") == 10
    assert f"{len(lost) - 10} more are in the release" in page
    assert "What comes next: 17 20 25 32?" in page


@pytest.mark.parametrize("decision", ["fail", "inconclusive"])
def test_a_verdict_against_the_release_leads_with_its_reasons(decision: str, tmp_path: Path) -> None:
    losing, questions = (0.2, 700) if decision == "fail" else (0.02, 100)
    data = release(losing=losing, questions=questions)
    write_report(tmp_path / "report.html", data)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    head = page[: page.index("Summary</h2>")]
    assert HEADLINES[decision] in head
    assert next(r for r in data.verdict.rules if r.decision == decision).explanation in head


@pytest.mark.parametrize("outcome", ["pass", "warn", "fail"])
def test_a_check_is_shown_as_it_came_out(outcome: str, tmp_path: Path) -> None:
    check = Check(name="tensor parallel", passed=outcome != "fail", warned=outcome == "warn", detail="TP 8 NO")
    page = written(tmp_path, verification=msgspec.structs.replace(release().verification, checks=[check]))
    (shown,) = re.findall(r'<span class="tag (\w+)">[^<]+</span></td><td>tensor parallel', page)
    assert shown == outcome


def test_each_outcome_has_a_colour_of_its_own_that_can_be_read_in_light_and_in_dark() -> None:
    for theme in CSS.split("@media (prefers-color-scheme: dark)")[:2]:
        page, *tags = (re.search(rf"--{name}: (#\w+)", theme)[1] for name in ("page", "pass", "warn", "fail"))
        assert len(set(tags)) == len(tags)
        assert min(contrast(page, tag) for tag in tags) > 4.5
    assert all(f".tag.{outcome} {{ color: var(--{outcome}); }}" in CSS for outcome in ("pass", "warn", "fail"))


def test_a_release_of_full_size_still_makes_a_page_that_opens(tmp_path: Path) -> None:
    assert len(written(tmp_path, calibration=calibration(layers=58, experts=256))) < 600_000


def test_an_expert_without_tokens_has_a_colour_of_its_own() -> None:
    assert 'path class="h0"' in plots.coverage(calibration())
    assert 'path class="h0"' not in plots.coverage(calibration(starved=False))


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (1234.5, "1,230"), (38.249, "38.2"), (0.01234, "0.0123"), (1000, "1,000")]
)
def test_numbers_have_three_significant_digits(value: float, said: str) -> None:
    assert drawing.significant(value) == said


@pytest.mark.parametrize(("count", "said"), [(999, "999 B"), (71_000_000, "71.0 MB"), (688_586_000_000, "689 GB")])
def test_bytes_are_said_in_the_unit_that_fits(count: int, said: str) -> None:
    assert drawing.human_bytes(count) == said


def test_the_page_says_why_not_with_the_arithmetic_and_what_to_do(tmp_path: Path) -> None:
    data = release(losing=0.2)
    steps = ["do <this>"]
    receipt = make_receipt(
        data.release_id, data.verdict, steps, data.comparison, data.source_accuracy, data.quantized_accuracy
    )
    write_report(tmp_path / "report.html", replace(data, receipt=receipt))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Why not</h2><p>fail: accuracy_loss.</p>" in page
    assert "n = 700 questions answered by both" in page
    assert "do &lt;this&gt;" in page
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert "Why not" not in written(tmp_path), "a release that passed has no such section"


def test_each_subject_has_its_loss_and_its_adjusted_p_value(tmp_path: Path) -> None:
    page = written(tmp_path)
    table = page[page.index("Loss by subject") :]
    for subject in release().comparison.subjects:
        assert f"<tr><td>{subject.subject}<small>{subject.questions} questions" in table
        assert f'<td class="num">{subject.p_adjusted:.2g}<small>alone {subject.p_value:.2g}</small></td>' in table

"""The report holds what the records say, escapes what a model wrote, and asks the network for nothing."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from lightship.eval import plots
from lightship.eval.report import HEADLINES, write_report
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


def test_the_report_is_well_formed_and_shows_every_rule_figure_and_identity(tmp_path: Path) -> None:
    page = written(tmp_path)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    data = release()
    assert HEADLINES[data.verdict.decision] in page
    assert page.count("<figure>") == 6
    for said in (data.release_id, data.source_digest, data.quantized.manifest_digest, *data.next_commands):
        assert said in page
    for rule in data.verdict.rules:
        assert rule.value in page


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


def test_a_release_of_full_size_still_makes_a_page_that_opens(tmp_path: Path) -> None:
    assert len(written(tmp_path, calibration=calibration(layers=58, experts=256))) < 600_000


def test_an_expert_without_tokens_has_a_colour_of_its_own() -> None:
    assert 'path class="h0"' in plots.coverage(calibration())
    assert 'path class="h0"' not in plots.coverage(calibration(starved=False))


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (1234.5, "1,230"), (38.249, "38.2"), (0.01234, "0.0123"), (1000, "1,000")]
)
def test_numbers_have_three_significant_digits(value: float, said: str) -> None:
    assert plots.significant(value) == said


@pytest.mark.parametrize(("count", "said"), [(999, "999 B"), (71_000_000, "71.0 MB"), (688_586_000_000, "689 GB")])
def test_bytes_are_said_in_the_unit_that_fits(count: int, said: str) -> None:
    assert plots.human_bytes(count) == said

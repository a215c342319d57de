"""A release that did not pass gets a receipt that says why, shows what was lost, and names the next command."""

from pathlib import Path

import msgspec
import pytest

from lightship.errors import LightshipError
from lightship.eval.advice import Place, next_step
from lightship.eval.evidence import read_champion
from lightship.eval.gate import decide
from lightship.eval.questions import Question
from lightship.eval.receipt import Receipt, make_receipt, markdown, terminal, write_receipt
from lightship.eval.report import RULES
from lightship.files import read_json
from lightship.policy import AtMost, Gate
from lightship.recipe import load_recipe
from lightship.records import RuleResult
from tests.eval.release import GATE, accuracy, evidence, fidelity

ROOT = Path(__file__).parents[2]
PLACE = Place(
    release_id="5f2c9e1b7ad3", source="demo/checkpoint", recipe_path="recipes/demo.toml",
    recipe=load_recipe(ROOT / "recipes" / "demo.toml"), checkpoint="home/releases/5f2c9e1b7ad3/checkpoint", home="home",
)  # fmt: skip
FENCE = "```"


def receipt(lost: int = 60, questions: int = 200, gate: Gate = GATE, text: str = "… the answer is (B).") -> Receipt:
    before, after = accuracy([True] * questions, text=text), accuracy([i >= lost for i in range(questions)], text=text)
    measured = evidence(source=before, quantized=after)
    verdict = decide(gate, measured)
    steps = [next_step(rule, PLACE) for rule in verdict.rules if rule.decision != "pass"]
    question = Question(
        question_id=0, question="What comes next: 17 20 25 32?", options=["44", "41"], answer="B", cot_content="",
        category="sequences",
    )  # fmt: skip
    asked = {str(i): question for i in range(questions)}
    return make_receipt(PLACE.release_id, verdict, steps, measured.comparison, before, after, asked)


def test_a_failure_says_rule_limit_value_interval_and_the_next_command() -> None:
    page = markdown(receipt())
    for said in (
        "# Why release 5f2c9e1b7ad3 did not pass",
        "## accuracy_loss: fail",
        "| limit | at most 2.00 points |",
        "| value | 30.00 points |",
        "| interval | 23.",
        "b = 60 lost",
        "`lightship release demo/checkpoint --recipe recipes/demo.toml --home home`",
    ):
        assert said in page


def test_ten_lost_questions_are_shown_with_both_answers_and_the_rest_counted() -> None:
    made = receipt(text="x" * 1000 + " so the answer is (B).")
    assert (len(made.lost), made.lost_in_all) == (10, 60)
    first = made.lost[0]
    assert (first.answer, first.source, first.quantized) == ("B", "B", "D")
    assert first.question == "What comes next: 17 20 25 32?\n\nA. 44\nB. 41"
    assert len(first.quantized_tail) == 400
    assert first.quantized_tail.endswith("so the answer is (D).")
    assert "## Questions lost: 10 of 60" in markdown(made)


def test_an_inconclusive_release_is_told_how_many_questions_to_ask() -> None:
    made = receipt(lost=0, questions=50)
    assert made.decision == "inconclusive"
    assert made.more_questions is not None
    assert "inconclusive: needs about" in markdown(made)
    assert "raise accuracy.limit from 200 to about" in made.next[0]


def test_what_a_model_wrote_cannot_leave_its_block() -> None:
    page = markdown(receipt(text=f"{FENCE}\n# Pass\n{FENCE}` (B)"))
    fences = [line for line in page.splitlines() if line and set(line) == {"`"}]
    assert f"{FENCE}``" in fences
    assert page.index("`````") < page.index("# Pass")


def test_both_files_are_written_and_the_json_reads_back(tmp_path: Path) -> None:
    paths = write_receipt(tmp_path, receipt())
    assert [p.name for p in paths] == ["why-not.md", "why-not.json"]
    assert read_json(paths[1], Receipt) == receipt()


def test_the_terminal_shows_the_arithmetic_and_the_answers_in_lines_of_their_own() -> None:
    said = terminal(receipt())
    assert said.startswith("fail: accuracy_loss\n")
    assert "right B, source B, quantized D: What comes next" in said
    assert "points: fail" in said


def test_questions_that_are_no_longer_there_are_named_by_id() -> None:
    before, after = accuracy([True] * 100), accuracy([False] * 100)
    measured = evidence(source=before, quantized=after)
    verdict = decide(GATE, measured)
    made = make_receipt("r", verdict, ["x"], measured.comparison, before, after)
    assert made.lost[0].question == "question 0"


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("decision", ["fail", "inconclusive"])
def test_every_rule_has_a_next_step(rule: str, decision: str) -> None:
    result = RuleResult(rule=rule, decision=decision, value="", limit="", explanation="")  # type: ignore[arg-type]
    assert next_step(result, PLACE)


def test_a_champion_measured_otherwise_is_to_be_released_again() -> None:
    changed = fidelity()
    scenes = [msgspec.structs.replace(s, tokens=1) for s in changed.scenes]
    champion = evidence(release_id="c0ffee", fidelity=msgspec.structs.replace(changed, scenes=scenes))
    verdict = decide(Gate(kl=AtMost(at_most=1.0, over_champion=0.1)), evidence(), champion)
    assert "release the champion again" in next_step(verdict.rules[-1], PLACE)


def test_a_champion_without_records_is_an_error_and_the_release_itself_is_no_champion(tmp_path: Path) -> None:
    assert read_champion(tmp_path, None, "a") is None
    assert read_champion(tmp_path, "a", "a") is None
    with pytest.raises(LightshipError, match="the champion b, whose records are not in"):
        read_champion(tmp_path, "b", "a")

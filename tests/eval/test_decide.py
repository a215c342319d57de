"""`lightship decide` judges a finished release by any policy, runs nothing and writes nothing."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from lightship.errors import LightshipError
from lightship.eval.evidence import read_measured, read_receipt
from lightship.eval.gate import decide
from lightship.eval.questions import Question, read_questions
from lightship.files import read_json, write_json
from lightship.recipe import load_recipe
from lightship.records import AnsweredQuestion, Verdict
from lightship.release import Identity, ReleaseFile
from tests.commands import lightship, refusal
from tests.eval.release import accuracy, evidence, verification

ROOT = Path(__file__).parents[2]
RELEASE = "5f2c9e1b7ad3"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The records of a release that lost 20 of 200 demo questions."""
    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    asked = read_questions(Path(recipe.accuracy.questions)).test[:200]
    source, quantized = (
        msgspec.structs.replace(made, answers=renamed(made.answers, asked))
        for made in (accuracy([True] * 200), accuracy([i >= 20 for i in range(200)]))
    )
    made = evidence(source=source, quantized=quantized)
    directory = tmp_path / "releases" / RELEASE
    for name, record in {
        "plan": made.plan, "calibration": made.calibration, "verification": made.verification, "accuracy": quantized,
        "source-accuracy": source, "comparison": made.comparison, "fidelity": made.fidelity,
        "throughput": made.throughput,
    }.items():  # fmt: skip
        write_json(directory / f"{name}.json", record)
    identity = Identity(source="s", recipe="r", texts="t", questions="q", code="c", engine="e")
    file = ReleaseFile(
        release_id=RELEASE, identity=identity, source="demo/checkpoint", recipe_path="recipes/demo.toml", recipe=recipe,
        versions={},
    )  # fmt: skip
    write_json(directory / "release.json", file)
    return directory


def renamed(answers: list[AnsweredQuestion], asked: Sequence[Question]) -> list[AnsweredQuestion]:
    pairs = zip(answers, asked, strict=True)
    return [msgspec.structs.replace(answer, question_id=str(q.question_id)) for answer, q in pairs]


def test_a_stricter_policy_fails_with_the_questions_lost_and_writes_nothing(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.toml").write_text("[gate]\naccuracy_loss = 0.02\nkl = 0.001\n")
    before = sorted(directory.iterdir())
    out = tmp_path / "verdict.json"
    done = lightship("decide", RELEASE[:5], "--home", tmp_path, "--policy", tmp_path / "strict.toml", "--out", out)
    assert done.returncode == 1, done.stderr
    assert "verdict: fail: accuracy_loss, kl" in done.stdout
    assert "n = 200 questions answered by both, b = 20 lost, c = 0 gained" in done.stdout
    assert "lost, 10 of 20:" in done.stdout
    assert "`lightship release demo/checkpoint --recipe recipes/demo.toml" in done.stdout
    assert sorted(directory.iterdir()) == before
    verdict = read_json(out, Verdict)
    assert {r.rule: r.decision for r in verdict.rules} == {
        "verification": "pass",
        "accuracy_loss": "fail",
        "kl": "fail",
    }


def test_a_laxer_policy_passes(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "lax.toml").write_text("[gate]\naccuracy_loss = 0.2\n")
    done = lightship("decide", RELEASE, "--home", tmp_path, "--policy", tmp_path / "lax.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: pass" in done.stdout
    assert directory.is_dir()


def test_a_policy_that_cannot_be_read_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[gate]\nkl = 0.1\nklworst = 1\n")
    said = refusal("decide", directory.name, "--home", tmp_path, "--policy", tmp_path / "wrong.toml")
    assert "unknown field `klworst`" in said


def test_the_receipt_shows_the_questions_as_they_were_asked(directory: Path) -> None:
    recipe = read_json(directory / "release.json", ReleaseFile).recipe
    receipt = read_receipt(directory, decide(recipe.gate, read_measured(directory)))
    assert receipt is not None
    assert len(receipt.lost) == 10
    assert "\nA. " in receipt.lost[0].question


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "Ada"], "--by and --reason belong to --override"),
        (["--override", "--by", "Ada"], "needs a name and a reason, and --reason is empty"),
        (["--override", "--reason", "because"], "needs a name and a reason, and --by is empty"),
    ],
)
def test_an_override_is_signed_or_refused(directory: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refusal("promote", directory.name, "--home", tmp_path, *arguments)


def test_a_checkpoint_that_cannot_be_served_gets_a_receipt_before_any_question_is_asked(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightship.flows.release import verify_checkpoint

    for record in ("accuracy", "source-accuracy", "comparison", "fidelity", "throughput"):
        (directory / f"{record}.json").unlink()
    monkeypatch.setattr("lightship.quant.verify.verify", lambda *_: verification(passed=False))
    work = SimpleNamespace(
        directory=directory,
        checkpoint_dir=directory / "checkpoint",
        source=SimpleNamespace(path=Path("demo/checkpoint")),
        stage=lambda _name, _kind, run: run(),
    )
    with pytest.raises(LightshipError, match=r"not servable: every scale is finite.*; see .*/why-not.md"):
        verify_checkpoint.fn(work)
    page = (directory / "why-not.md").read_text()
    assert "## verification: fail" in page
    assert "`lightship verify" in page
    assert not (directory / "verdict.json").is_file()

"""All that a finished release's directory says about it, gathered for its gate, its receipt and its report.

lightship report RELEASE
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lightship.errors import EvaluationError, LightshipError
from lightship.eval.advice import Place, next_step
from lightship.eval.losses import compare_with_champion
from lightship.eval.measures import Evidence
from lightship.eval.questions import Question, load_questions, read_questions
from lightship.eval.receipt import JSON, MARKDOWN, Receipt, make_receipt, write_receipt
from lightship.eval.report_data import ReportData
from lightship.files import read_json
from lightship.records import (
    Accuracy,
    Agreement,
    Calibration,
    Comparison,
    Fidelity,
    Plan,
    Quantized,
    Staged,
    Throughput,
    Verdict,
    Verification,
)
from lightship.release import ReleaseFile


def read_evidence(directory: Path) -> ReportData:
    """Every record of the release in `directory`.

    Raises:
        LightshipError: the release is not finished; names the record that is missing.
        EvaluationError: the questions that were asked are no longer there.
    """
    release = read_json(directory / "release.json", ReleaseFile)
    staged = read_json(directory / "staged.json", Staged)
    verdict = read_json(directory / "verdict.json", Verdict)
    checkpoint = directory / "checkpoint"
    next_commands = [
        f"lightship serve {checkpoint} --tp {staged.tensor_parallel}",
        f"lightship verify {checkpoint} --against {release.source}",
    ]
    if verdict.decision == "pass" and not (directory / "promoted.json").is_file():
        next_commands.append(f"lightship promote {release.release_id} --home {directory.parent.parent}")
    measured = read_measured(directory)
    return ReportData(
        release_id=release.release_id,
        model=release.recipe.model,
        recipe=release.recipe_path,
        source=release.source,
        source_digest=release.identity.source,
        plan=measured.plan,
        calibration=measured.calibration,
        quantized=read_json(directory / "quantized.json", Quantized),
        verification=measured.verification,
        staged=staged,
        source_accuracy=measured.source,
        quantized_accuracy=measured.quantized,
        agreement=read_json(directory / "agreement.json", Agreement),
        comparison=measured.comparison,
        fidelity=measured.fidelity,
        throughput=measured.throughput,
        verdict=verdict,
        versions=release.versions,
        next_commands=next_commands,
        questions=_questions(release),
        receipt=read_receipt(directory, verdict),
    )


def read_measured(directory: Path) -> Evidence:
    """What a gate reads of the release in `directory`.

    Raises:
        LightshipError: a stage is not finished; names its record.
    """
    return Evidence(
        release_id=directory.name,
        plan=read_json(directory / "plan.json", Plan),
        calibration=read_json(directory / "calibration.json", Calibration),
        verification=read_json(directory / "verification.json", Verification),
        source=read_json(directory / "source-accuracy.json", Accuracy),
        quantized=read_json(directory / "accuracy.json", Accuracy),
        comparison=read_json(directory / "comparison.json", Comparison),
        fidelity=read_json(directory / "fidelity.json", Fidelity),
        throughput=read_json(directory / "throughput.json", Throughput),
    )


def read_champion(home: Path, champion: str | None, challenger: str) -> Evidence | None:
    """What a gate reads of the champion; None if there is none, or if it is the challenger itself.

    Raises:
        LightshipError: its records are not in `home`.
    """
    if champion is None or champion == challenger:
        return None
    directory = home / "releases" / champion
    if not directory.is_dir():
        raise LightshipError(
            f"the gate compares with the champion {champion}, whose records are not in {home}; copy its directory "
            "there, or give --home where it was released"
        )
    return read_measured(directory)


def read_receipt(directory: Path, verdict: Verdict) -> Receipt | None:
    """Why the release in `directory` did not pass; None if it did. The verdict need not be the one that is stored.

    Raises:
        LightshipError: the release is not finished; names the record that is missing.
    """
    if verdict.decision == "pass":
        return None
    release = read_json(directory / "release.json", ReleaseFile)
    place = place_of(directory, release)
    not_met = [rule for rule in verdict.rules if rule.decision != "pass"]
    steps = [next_step(rule, place) for rule in not_met]
    if not (directory / "comparison.json").is_file():
        return make_receipt(release.release_id, verdict, steps)
    measured = read_measured(directory)
    questions = _questions_if_there(release)
    lost_against = {rule.against for rule in not_met if rule.rule in ("accuracy_loss", "subject_loss")}
    if lost_against == {"champion"} and verdict.champion:
        champion = read_champion(directory.parent.parent, verdict.champion, release.release_id)
        assert champion is not None
        with suppress(EvaluationError):  # they cannot be paired, which the rule says
            comparison = compare_with_champion(champion, measured)
            answers = comparison, champion.quantized, measured.quantized
            return make_receipt(release.release_id, verdict, steps, *answers, questions, verdict.champion)
    answers = measured.comparison, measured.source, measured.quantized
    return make_receipt(release.release_id, verdict, steps, *answers, questions)


def leave_receipt(directory: Path, verdict: Verdict) -> list[Path]:
    """Write why the release in `directory` did not pass; returns the files, none if it did."""
    for old in (MARKDOWN, JSON):
        (directory / old).unlink(missing_ok=True)
    receipt = read_receipt(directory, verdict)
    return write_receipt(directory, receipt) if receipt else []


def place_of(directory: Path, release: ReleaseFile) -> Place:
    """Where the release lies."""
    return Place(
        release_id=release.release_id,
        source=release.source,
        recipe_path=release.recipe_path,
        recipe=release.recipe,
        checkpoint=str(directory / "checkpoint"),
        home=str(directory.parent.parent),
    )


def _questions_if_there(release: ReleaseFile) -> Mapping[str, Question]:
    """A receipt is worth having without them."""
    try:
        return _questions(release)
    except EvaluationError:
        return {}


def _questions(release: ReleaseFile) -> Mapping[str, Question]:
    task = release.recipe.accuracy
    questions = (read_questions(Path(task.questions)) if task.questions else load_questions(task.revision)).test
    return {str(q.question_id): q for q in questions}

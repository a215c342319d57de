"""All that a finished release's directory says about it, gathered for its report.

lightship report RELEASE
"""

from pathlib import Path

from lightship.eval.questions import load_questions, read_questions
from lightship.eval.report import ReportData
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
    task = release.recipe.accuracy
    questions = (read_questions(Path(task.questions)) if task.questions else load_questions(task.revision)).test
    return ReportData(
        release_id=release.release_id,
        model=release.recipe.model,
        recipe=release.recipe_path,
        source=release.source,
        source_digest=release.identity.source,
        plan=read_json(directory / "plan.json", Plan),
        calibration=read_json(directory / "calibration.json", Calibration),
        quantized=read_json(directory / "quantized.json", Quantized),
        verification=read_json(directory / "verification.json", Verification),
        staged=staged,
        source_accuracy=read_json(directory / "source-accuracy.json", Accuracy),
        quantized_accuracy=read_json(directory / "accuracy.json", Accuracy),
        agreement=read_json(directory / "agreement.json", Agreement),
        comparison=read_json(directory / "comparison.json", Comparison),
        fidelity=read_json(directory / "fidelity.json", Fidelity),
        throughput=read_json(directory / "throughput.json", Throughput),
        verdict=verdict,
        versions=release.versions,
        next_commands=next_commands,
        questions={str(q.question_id): q for q in questions},
    )

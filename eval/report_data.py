"""What a report shows: the records of one release, and what else is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightship.eval.questions import Question
from lightship.eval.receipt import Receipt
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


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows: the records of one release."""

    release_id: str
    model: str
    """The registered model's name."""
    recipe: str
    """Path of the recipe."""
    source: str
    """Where the source came from: a path, or repository@commit."""
    source_digest: str
    plan: Plan
    calibration: Calibration
    quantized: Quantized
    verification: Verification
    staged: Staged
    source_accuracy: Accuracy
    quantized_accuracy: Accuracy
    agreement: Agreement
    comparison: Comparison
    fidelity: Fidelity
    throughput: Throughput
    verdict: Verdict
    versions: Mapping[str, str]
    """Program -> version, lightship's own included."""
    next_commands: list[str]
    questions: Mapping[str, Question] = field(default_factory=dict)
    """Questions by id, to show the lost ones with their text."""
    receipt: Receipt | None = None
    """Why not, if the release did not pass."""

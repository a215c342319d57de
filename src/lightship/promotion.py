"""Promotion: what was evaluated is what becomes champion, or it is refused.

lightship promote RELEASE
"""

from pathlib import Path

from lightship import summary
from lightship.checkpoint import MANIFEST
from lightship.errors import PromotionError
from lightship.files import digest_of_file, read_json
from lightship.manifest import check_files
from lightship.records import Promoted, Staged, Verdict
from lightship.tracking import Tracker


def promote(directory: Path, model: str, tracker: Tracker) -> Promoted:
    """Make the release in `directory` the champion of the registered `model`.

    Raises:
        PromotionError: the verdict is not `pass`, or the checkpoint is not the one that was evaluated.
        CheckpointError: a file of the checkpoint differs from its manifest.
        LightshipError: the release is unfinished, or not registered.
    """
    if not (directory / "verdict.json").is_file():
        raise PromotionError(f"release {directory.name} is unfinished; run its `lightship release` again, it goes on")
    verdict = read_json(directory / "verdict.json", Verdict)
    if verdict.decision != "pass":
        raise PromotionError(f"{directory.name} is not promoted, its verdict is {summary.sentence(verdict)}")
    checkpoint = directory / "checkpoint"
    check_files(checkpoint)
    staged = read_json(directory / "staged.json", Staged)
    found = digest_of_file(checkpoint / MANIFEST)
    if found != staged.manifest_digest:
        raise PromotionError(
            f"{directory.name} is not promoted: its manifest is {found[:12]}, what was evaluated had "
            f"{staged.manifest_digest[:12]}; remove {directory} and release it again"
        )
    return tracker.promote(model, tracker.version_of(model, directory.name, found))

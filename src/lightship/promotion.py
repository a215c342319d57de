"""Promotion: what was evaluated is what becomes champion, or it is refused.

    lightship promote RELEASE
    lightship promote RELEASE --override --by NAME --reason TEXT

A person may set the gate's verdict aside, with name and reason. That the files are those that were evaluated is asked
of every promotion.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lightship import summary
from lightship.checkpoint import MANIFEST
from lightship.errors import PromotionError
from lightship.files import digest_of_file, read_json
from lightship.manifest import check_files
from lightship.records import Override, Promoted, Staged, Verdict
from lightship.tracking import Tracker


@dataclass(frozen=True)
class Signature:
    """Who sets a verdict aside, and why."""

    by: str
    reason: str

    def __post_init__(self) -> None:
        for name, text in (("--by", self.by), ("--reason", self.reason)):
            if not text.strip():
                raise PromotionError(f"an override needs a name and a reason, and {name} is empty")


def promote(directory: Path, model: str, tracker: Tracker, signature: Signature | None = None) -> Promoted:
    """Make the release in `directory` the champion of the registered `model`.

    Args:
        signature: sets aside a verdict that is not `pass`, and is recorded; a passing release needs none.

    Raises:
        PromotionError: the verdict is not `pass` and nobody signs, or the checkpoint is not the one that was evaluated.
        CheckpointError: a file of the checkpoint differs from its manifest.
        LightshipError: the release is unfinished, or not registered.
    """
    if not (directory / "verdict.json").is_file():
        raise PromotionError(f"release {directory.name} is unfinished; run its `lightship release` again, it goes on")
    verdict = read_json(directory / "verdict.json", Verdict)
    if verdict.decision != "pass" and signature is None:
        raise PromotionError(
            f"{directory.name} is not promoted, its verdict is {summary.sentence(verdict)} See "
            f"{directory / 'why-not.md'}; a person may promote it by --override --by NAME --reason TEXT"
        )
    champion = tracker.champion_release(model)
    compared = any(rule.against == "champion" for rule in verdict.rules)
    if compared and champion not in (verdict.champion, directory.name) and signature is None:
        raise PromotionError(
            f"{directory.name} is not promoted: it was judged against {verdict.champion or 'no champion'}, and "
            f"{champion} is champion now; `lightship decide {directory.name}` shows how they compare, and without "
            f"{directory / 'verdict.json'} `lightship release` judges it again"
        )
    checkpoint = directory / "checkpoint"
    check_files(checkpoint)
    staged = read_json(directory / "staged.json", Staged)
    found = digest_of_file(checkpoint / MANIFEST)
    if found != staged.manifest_digest:
        raise PromotionError(
            f"{directory.name} is not promoted: its manifest is {found[:12]}, what was evaluated had "
            f"{staged.manifest_digest[:12]}; remove {directory} and release it again"
        )
    version = tracker.version_of(model, directory.name, found)
    return tracker.promote(model, version, _override(verdict, signature))


def _override(verdict: Verdict, signature: Signature | None) -> Override | None:
    if verdict.decision == "pass" or signature is None:
        return None
    return Override(
        by=signature.by,
        reason=signature.reason,
        verdict=verdict.decision,
        rules=[rule.rule for rule in verdict.rules if rule.decision != "pass"],
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )

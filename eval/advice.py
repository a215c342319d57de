"""What to do about a rule that was not met: the next command, and what to change before it.

lightship decide RELEASE
"""

from dataclasses import dataclass
from pathlib import Path

from lightship.eval.losses import rounded_up
from lightship.recipe import Recipe
from lightship.records import RuleResult

QUANTIZE_BETTER = (
    "round more carefully ([quantization]: gptq, more sweeps, rules) or calibrate on more text like what was lost"
)


@dataclass(frozen=True)
class Place:
    """Where a release came from and lies, as its commands name it."""

    release_id: str
    source: str
    recipe_path: str
    recipe: Recipe
    checkpoint: str
    home: str

    @property
    def again(self) -> str:
        """The command that makes the next release of the same source."""
        return f"`lightship release {self.source} --recipe {self.recipe_path} --home {self.home}`"


def next_step(rule: RuleResult, place: Place) -> str:
    """One line, with a command to run."""
    if rule.against == "champion" and rule.decision == "inconclusive" and rule.more_questions is None:
        return f"release the champion again under the same settings, then {place.again}"
    if rule.decision == "inconclusive":
        return _more_questions(rule, place)
    if rule.rule == "verification":
        return (
            f"`lightship verify {place.checkpoint} --against {place.source}` names every tensor that is wrong; remove "
            f"the release's directory, then {place.again}"
        )
    if rule.rule in ("accuracy_loss", "subject_loss", "kl", "kl_worst_scene", "top1_agreement"):
        return f"{QUANTIZE_BETTER}, then {place.again}"
    if rule.rule == "truncated":
        tokens = place.recipe.accuracy.max_tokens
        return f"raise accuracy.max_tokens ({tokens}) if the answers are sound, then {place.again}"
    if rule.rule == "unparsed":
        record = Path(place.checkpoint).with_name("accuracy.json")
        return f"read the answers in which no letter was found, those without `predicted` in {record}"
    if rule.rule == "starved_experts":
        share = place.recipe.calibration.tokens_per_scene
        return f"raise calibration.tokens_per_scene ({share}) or add scenes, then {place.again}"
    if rule.rule in ("throughput_ratio", "ttft_ratio"):
        return (
            f"`lightship bench {place.checkpoint} --against {place.source} --recipe {place.recipe_path}` on a machine "
            "that does nothing else"
        )
    assert rule.rule in ("bytes_after", "experts_shrink", "fit"), rule.rule
    return f"`lightship plan {place.source} --recipe {place.recipe_path}` shows where the bytes are"


def _more_questions(rule: RuleResult, place: Place) -> str:
    limit = place.recipe.accuracy.limit
    if rule.more_questions is None:
        return (
            "the loss seen is the limit itself: quantize better, or raise accuracy.limit to see on which side it lies"
        )
    more = rounded_up(rule.more_questions)
    if limit is None:
        return f"all questions were asked: add about {more:,} to accuracy.questions, then {place.again}"
    return f"raise accuracy.limit from {limit:,} to about {limit + more:,}, then {place.again}"

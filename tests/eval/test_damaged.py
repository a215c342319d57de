"""Each way to damage the embedded model is refused by the demo's gate, and the rule that sees it says why.

benchmarks/damaged.py shows it on the whole path, with servers and questions.
"""

from pathlib import Path

import pytest
from benchmarks.damages import DAMAGES, damage_checkpoint

from lightship.eval.fidelity import measure_fidelities
from lightship.eval.gate import decide
from lightship.quant.verify import verify
from lightship.recipe import CalibrationText, FidelityText, Quantization, load_recipe
from lightship.records import RuleResult
from tests.conftest import DEMO, ROOT, quantize_checkpoint
from tests.eval.release import evidence

RECIPE = load_recipe(ROOT / "recipes" / "demo.toml")
SAME_MODEL = ("verification", "kl", "kl_worst_scene", "top1_agreement")
SOUND, PERMUTED, INPUT_SCALES, GROUP_SCALES, COARSE = "sound", *DAMAGES
EXPERT = "model.layers.1.mlp.experts.0"
Refusals = dict[str, RuleResult]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint, rounded by the MSE grid, which needs hardly any text, and its damaged copies."""
    folder = tmp_path_factory.mktemp("damaged")
    text = CalibrationText(sources=RECIPE.calibration.sources, tokens_per_scene=256, sequence_tokens=256)
    quantize_checkpoint(DEMO, folder / SOUND, text, Quantization(method="mse"))
    made = {name: damage_checkpoint(folder / SOUND, DEMO, folder / name, damage) for name, damage in DAMAGES.items()}
    return {SOUND: folder / SOUND} | made


@pytest.fixture(scope="module")
def refused(checkpoints: dict[str, Path]) -> dict[str, Refusals]:
    """Checkpoint -> the rules of the demo's gate that it does not meet, of those that compare it with the source."""
    held_out = FidelityText(sources=RECIPE.fidelity.sources, tokens_per_scene=1024, sequence_tokens=512)
    fidelities = measure_fidelities(DEMO, list(checkpoints.values()), held_out)
    refused = {}
    for (name, path), fidelity in zip(checkpoints.items(), fidelities, strict=True):
        verdict = decide(RECIPE.gate, evidence(verification=verify(path, DEMO), fidelity=fidelity))
        not_met = [rule for rule in verdict.rules if rule.rule in SAME_MODEL and rule.decision != "pass"]
        refused[name] = {rule.rule: rule for rule in not_met}
    return refused


def test_the_sound_checkpoint_is_refused_by_no_rule(refused: dict[str, Refusals]) -> None:
    assert refused[SOUND] == {}


def test_permuted_experts_are_named_against_the_source_and_move_the_model(refused: dict[str, Refusals]) -> None:
    assert list(refused[PERMUTED]) == list(SAME_MODEL)
    said = f"packing: {EXPERT}.gate_proj.weight: it is gate_proj of the source's expert 15: experts have changed places"
    assert refused[PERMUTED]["verification"].explanation.startswith(said)


def test_only_the_divergence_sees_permuted_experts_where_the_audit_has_no_source(
    checkpoints: dict[str, Path], refused: dict[str, Refusals]
) -> None:
    assert verify(checkpoints[PERMUTED]).passed
    assert "kl" in refused[PERMUTED]


def test_input_scales_at_one_are_named_though_dynamic_activations_do_not_use_them(
    checkpoints: dict[str, Path], refused: dict[str, Refusals]
) -> None:
    assert list(refused[INPUT_SCALES]) == ["verification"]
    said = "input scales: model.layers.1.mlp: every input scale is 1.0"
    assert refused[INPUT_SCALES]["verification"].explanation.startswith(said)
    assert not verify(checkpoints[INPUT_SCALES]).passed


def test_group_scales_at_one_are_named_with_and_without_the_source(
    checkpoints: dict[str, Path], refused: dict[str, Refusals]
) -> None:
    assert list(refused[GROUP_SCALES]) == list(SAME_MODEL)
    said = f"groups: {EXPERT}.gate_proj.weight_scale_inv: every group scale is 1.0"
    assert refused[GROUP_SCALES]["verification"].explanation.startswith(said)
    assert not verify(checkpoints[GROUP_SCALES]).passed


def test_coarse_groups_load_and_are_refused_by_what_they_cost(refused: dict[str, Refusals]) -> None:
    assert "verification" not in refused[COARSE], "groups of 128 that share a scale are W4AFP8"
    assert "kl" in refused[COARSE]

"""The report's sections on the checkpoint: its size, how it was rounded, what calibration saw."""

from html import escape
from statistics import mean

from lightship.eval import plots
from lightship.eval.drawing import NARROW, human_bytes
from lightship.eval.report_data import ReportData
from lightship.eval.report_parts import figure, percent
from lightship.records import Calibration

MOST_NAMED = 10
"""Experts named in a sentence."""


def size_and_rounding(release: ReportData) -> str:
    """Where the bytes are, and the error of rounding by layer, of the weights and of the outputs."""
    verified = release.verification.layers
    weights = {
        "first": [(e.layer_name, e.w13) for e in verified],
        "second": [(e.layer_name, e.w2) for e in verified],
    }
    made = "<h2>Size and rounding</h2>" + figure(
        "Where the bytes are",
        plots.bytes_by_part(release.plan),
        f"Only the routed experts become smaller: by {percent(release.plan.experts_shrink)}, scales included. "
        f"On disk the quantized checkpoint takes {human_bytes(release.quantized.bytes_total)}.",
        plots.bytes_by_part(release.plan, NARROW),
    )
    of_outputs, of_weights = (
        f"Relative squared error of the experts' {what}, by layer" for what in ("outputs", "weights")
    )
    outputs = _output_errors(release.calibration)
    if outputs:
        made += figure(
            "Rounding error of the experts' outputs",
            plots.errors_by_layer(outputs, of_outputs),
            "‖y − y′‖² / ‖y‖² on the calibration tokens, the mean over a layer's experts. This is what rounding tries "
            "to keep small.",
            plots.errors_by_layer(outputs, of_outputs, NARROW),
        )
    if verified:
        made += figure(
            "Rounding error of the experts' weights",
            plots.errors_by_layer(weights, of_weights),
            "‖w − w′‖² / ‖w‖² over a layer's experts, as verified against the source. A method that accounts for the "
            "inputs, as GPTQ does, accepts a larger error here for a smaller one in the outputs.",
            plots.errors_by_layer(weights, of_weights, NARROW),
        )
    return made


def _output_errors(calibration: Calibration) -> plots.Series:
    """Empty if no layer's outputs were measured, as without a Hessian."""
    found: dict[str, list[tuple[str, float]]] = {"first": [], "second": []}
    for layer in calibration.layers:
        for css, errors in (
            ("first", [e.w13_output_error for e in layer.experts]),
            ("second", [e.w2_output_error for e in layer.experts]),
        ):
            known = [error for error in errors if error is not None]
            if known:
                found[css].append((layer.layer_name, mean(known)))
    return found if found["first"] and len(found["first"]) == len(found["second"]) else {}


def calibration_coverage(release: ReportData) -> str:
    """What the calibration text was, and what each expert saw of it."""
    calibration = release.calibration
    scenes = ", ".join(f"{escape(scene)} {tokens:,}" for scene, tokens in calibration.tokens.items())
    fewest = min(min(layer.tokens_of_experts()) for layer in calibration.layers)
    experts = sum(len(layer.tokens_of_experts()) for layer in calibration.layers)
    starved, without = calibration.starved, calibration.without_tokens
    if starved:
        said = f"{len(starved):,} of {experts:,} experts saw fewer than {calibration.token_floor:,}"
        said += f", {len(without):,} of them none: {_some(without)}." if without else f": {_some(starved)}."
    else:
        said = f"Every expert saw {calibration.token_floor:,} or more; the one reached least saw {fewest:,}."
    return f"<h2>Calibration</h2><p>Tokens by scene: {scenes}. {said}</p>" + figure(
        "What the experts saw",
        plots.coverage(calibration),
        "Tokens routed to each expert, as a multiple of an even share of its layer's. Routing is uneven by nature. An "
        "expert that is starved was rounded with its layer's tokens beside its own; one without tokens, without any.",
        plots.coverage(calibration, NARROW),
    )


def _some(names: list[str]) -> str:
    named = ", ".join(f"<code>{escape(name)}</code>" for name in names[:MOST_NAMED])
    return named + (f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else "")

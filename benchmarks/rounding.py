"""Rounding methods side by side on the embedded model: GPTQ, MSE-grid and absmax/7, on the same calibration text.

Each method's checkpoint is written, compared with the FP8 source token by token on held-out text, served, and asked
every demo question. Writes benchmarks/rounding.json and benchmarks/rounding.md.

    make bench        (or: python benchmarks/rounding.py)
"""

import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship import summary
from lightship.cli import DEFAULTS
from lightship.eval.accuracy import evaluate
from lightship.eval.comparison import compare
from lightship.eval.fidelity import measure_fidelities
from lightship.eval.machine import describe_machine
from lightship.files import write_json, write_text
from lightship.recipe import Quantization, load_recipe
from lightship.records import Accuracy, Comparison, Fidelity, Verification
from lightship.serving.launch import launched

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "demo" / "checkpoint"
COMMAND = "python benchmarks/rounding.py"
METHODS = {
    "absmax/7": Quantization(method="absmax"),
    "MSE grid": Quantization(method="mse", signed_scales=False),
    "MSE grid, signed scales": Quantization(method="mse"),
    "GPTQ, signed scales": Quantization(method="gptq"),
}


def main() -> None:
    """Measure every method and write the result files."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import msgspec

    from lightship.checkpoint import Checkpoint
    from lightship.progress import tracked
    from lightship.quant.plan import plan_quantization
    from lightship.quant.quantize import quantize
    from lightship.quant.verify import verify

    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    questions = msgspec.structs.replace(recipe.accuracy, limit=None)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = Checkpoint.open(SOURCE)
        plan = plan_quantization(checkpoint)
        verifications: dict[str, Verification] = {}
        paths = [work / f"method-{number}" for number in range(len(METHODS))]
        for (name, settings), path in zip(METHODS.items(), paths, strict=True):
            quantize(checkpoint, plan, recipe.calibration, settings, path, tracked, device="cpu")
            verifications[name] = verify(path, SOURCE)
            print(f"{name}: {summary.sentence(verifications[name])}", flush=True)
        fidelities = dict(zip(METHODS, measure_fidelities(SOURCE, paths, recipe.fidelity), strict=True))

        def answers(path: Path) -> Accuracy:
            with launched(path, recipe.serving, work / "serve.log") as server:
                return evaluate(server.endpoint, questions, work)

        source = answers(SOURCE)
        print(f"source: {summary.sentence(source)}", flush=True)
        comparisons: dict[str, Comparison] = {}
        for name, path in zip(METHODS, paths, strict=True):
            comparisons[name] = compare(source, answers(path))
            print(f"{name}: {summary.sentence(comparisons[name])}", flush=True)
    rows = [row(name, verifications[name], fidelities[name], comparisons[name]) for name in METHODS]
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "source_accuracy": source.accuracy,
        "questions": len(source.answers),
        "methods": rows,
    }
    write_json(ROOT / "benchmarks" / "rounding.json", result)
    write_text(ROOT / "benchmarks" / "rounding.md", markdown(result))
    print(markdown(result))


def row(name: str, verification: Verification, fidelity: Fidelity, comparison: Comparison) -> dict[str, Any]:
    """One method's figures."""
    return {
        "method": name,
        "weight_error": max(max(e.w13, e.w2) for e in verification.layers),
        "kl": fidelity.kl,
        "top1_agreement": fidelity.top1_agreement,
        "perplexity": {s.scene: s.perplexity_quantized for s in fidelity.scenes},
        "perplexity_source": {s.scene: s.perplexity_source for s in fidelity.scenes},
        "kl_by_scene": {s.scene: s.kl for s in fidelity.scenes},
        "accuracy": comparison.quantized_accuracy,
        "accuracy_loss": comparison.loss,
        "accuracy_loss_interval": [comparison.loss_low, comparison.loss_high],
        "questions_lost": len(comparison.lost),
        "questions_gained": len(comparison.gained),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    rows = result["methods"]
    scenes = list(rows[0]["perplexity"])
    head = ["method", "weight error", "KL, nats", "same top token", *(f"perplexity, {s}" for s in scenes), "accuracy"]
    head.append("loss, points (95 %)")
    source = ["FP8 source", "", "", "", *(f"{rows[0]['perplexity_source'][s]:.3f}" for s in scenes)]
    lines = [[*source, f"{result['source_accuracy']:.1%}", ""]]
    for r in rows:
        low, high = r["accuracy_loss_interval"]
        loss = f"{100 * r['accuracy_loss']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        cells = [r["method"], f"{r['weight_error']:.2%}", f"{r['kl']:.5f}", f"{r['top1_agreement']:.2%}"]
        lines.append([*cells, *(f"{r['perplexity'][s]:.3f}" for s in scenes), f"{r['accuracy']:.1%}", loss])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])
    return (
        "# Rounding methods on the embedded model\n\n"
        f"`{result['command']}`, {result['date']}, {result['machine']}.\n\n"
        "One calibration text, four roundings of the same routed experts. KL is KL(source || quantized) a token on\n"
        "held-out text; weight error is the worst layer's relative squared error; accuracy is on all "
        f"{result['questions']} demo questions\nthrough lm-eval.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()

"""Does the memory of `lightship quantize` stay flat as the model grows? Random models of 2, 8 and 32 layers on a CPU.

Each is a checkpoint of DeepSeek-V3's architecture with FP8 blocks; all have the same layers and the same calibration
tokens. `lightship quantize` runs on each as a user runs it, and its memory is read from the kernel while it runs.
Writes benchmarks/memory.json and benchmarks/memory.md.

    python -m benchmarks.memory        (or with --recipe RECIPE, to measure another one)
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship.checkpoint import Checkpoint
from lightship.eval.machine import describe_machine
from lightship.files import write_json, write_text
from tests.tiny import write_fp8_checkpoint

ROOT = Path(__file__).parents[1]
LAYERS = (2, 8, 32)
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "first_k_dense_replace": 0,
}
RECIPE = """
model = "memory"
calibration = {{ tokens_per_scene = 4096, sources = [{{ scene = "prose", path = "{text}/prose/calibration.jsonl" }}] }}
accuracy = {{ questions = "{root}/demo/questions" }}
fidelity = {{ sources = [{{ scene = "prose", path = "{text}/prose/heldout.jsonl" }}] }}
gate = {{ kl = 1.0 }}
"""
SAMPLE_SECONDS = 0.02
COUNTERS = {"VmHWM": "peak_rss_bytes", "RssAnon": "peak_anonymous_bytes", "RssFile": "peak_file_bytes"}
"""The kernel's counters, of which the largest value is kept. File pages are the libraries' code: weights are read, not
mapped."""


def main() -> None:
    """Measure every size and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="TOML file; by default GPTQ on 4096 tokens of the demo's prose")
    arguments = parser.parse_args()
    command = "python -m benchmarks.memory" + (f" --recipe {arguments.recipe}" if arguments.recipe else "")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = arguments.recipe or Path(folder) / "recipe.toml"
        if not arguments.recipe:
            recipe.write_text(RECIPE.format(root=ROOT, text=ROOT / "demo" / "text"))
        for layers in LAYERS:
            source, out = Path(folder) / f"source-{layers}", Path(folder) / f"out-{layers}"
            write_fp8_checkpoint(source, shards=layers, num_hidden_layers=layers, **SIZES)
            rows.append(
                {"layers": layers, "source_bytes": Checkpoint.open(source).nbytes} | run_quantize(source, out, recipe)
            )
            print(rows[-1], flush=True)
    result = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "sizes": SIZES,
        "models": rows,
    }
    write_json(ROOT / "benchmarks" / "memory.json", result)
    write_text(ROOT / "benchmarks" / "memory.md", markdown(result))
    print(markdown(result))


def run_quantize(source: Path, out: Path, recipe: Path) -> dict[str, Any]:
    """Run the command and return its seconds and its peaks of memory, bytes."""
    command = [sys.executable, "-m", "lightship", "quantize", str(source), str(out)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    peaks = dict.fromkeys(COUNTERS.values(), 0)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--recipe", str(recipe), "--device", "cpu"], env=environment, stdout=log, stderr=log
        )
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in COUNTERS:
                    peaks[COUNTERS[key]] = max(peaks[COUNTERS[key]], 1024 * int(value.split()[0]))
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")
    return {"seconds": time.monotonic() - start} | peaks


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    sizes = result["sizes"]
    lines = [
        ["layers", "source, MB", "peak memory, MB", "of it anonymous, MB", "file pages, MB", "time, s"],
        ["---"] * 6,
    ]
    for r in result["models"]:
        cells = [f"{r[key] / 1e6:.0f}" for key in ("source_bytes", *COUNTERS.values())]
        lines.append([str(r["layers"]), *cells, f"{r['seconds']:.0f}"])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return (
        "# Memory of `lightship quantize` as the model grows\n\n"
        f"`{result['command']}`, {result['date']}, {result['machine']}.\n\n"
        f"Random FP8 models: hidden size {sizes['hidden_size']}, {sizes['n_routed_experts']} experts of "
        f"{sizes['moe_intermediate_size']} a layer, the same calibration tokens for all.\nAnonymous memory is what the "
        "program holds, file pages are the code of Python, torch and transformers. Each column is\nthe largest value "
        f"seen.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()

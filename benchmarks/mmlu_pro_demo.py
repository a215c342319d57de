"""Real MMLU-Pro questions through lm-eval against the local engine, killed on the way, and gone on with.

    python -m benchmarks.mmlu_pro_demo path/to/mmlu_pro

PATH is a folder with MMLU-Pro's splits test and validation. The embedded model and its W4AFP8 answer the same
questions, some of each of the fourteen subjects, behind one server each. The model knows nothing of these subjects and
was trained on 2,048 tokens, less than most of the stock prompts have; its context is raised so that the prompts stay as
they are. It answers next to nothing readable, so that its score is below that of guessing: this shows that the
questions' way is whole, and that a killed evaluation loses nothing.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship.cli import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "demo" / "checkpoint"
RECIPE = ROOT / "recipes" / "mmlu_pro_demo.toml"
COMMAND = "python -m benchmarks.mmlu_pro_demo PATH"
CONTEXT_TOKENS = 8192
LIGHTSHIP = [sys.executable, "-c", "from lightship.cli import main; main()"]
KILLS = (0.3, 0.7)
"""The first evaluation is killed when this share of the questions is answered."""


def main() -> None:
    """Ask, kill, ask on, and write the result files."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {COMMAND}")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from lightship import summary
    from lightship.checkpoint import Checkpoint
    from lightship.eval.agreement import measure_agreement
    from lightship.eval.throughput import describe_machine
    from lightship.files import read_json, write_json, write_text
    from lightship.progress import tracked
    from lightship.quant.plan import plan_quantization
    from lightship.quant.quantize import quantize
    from lightship.recipe import load_recipe
    from lightship.records import Accuracy

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = RECIPE.read_text(encoding="utf-8").replace('"../', f'"{ROOT}/')
        recipe_path = work / "recipe.toml"
        recipe_path.write_text(
            text.replace("[accuracy]\n", f'[accuracy]\nquestions = "{Path(sys.argv[1]).resolve()}"\n')
        )
        recipe = load_recipe(recipe_path)
        limit = recipe.accuracy.limit
        assert limit is not None
        checkpoint = Checkpoint.open(SOURCE)
        plan = plan_quantization(checkpoint)
        quantize(checkpoint, plan, recipe.calibration, recipe.quantization, work / "W4AFP8", tracked, device="cpu")
        with served(with_context(SOURCE, work / "source"), recipe.serving, work) as url:
            command = [*LIGHTSHIP, "evaluate", url, "--tokenizer", str(SOURCE)]
            command += ["--recipe", str(recipe_path), "--out"]
            answers_at_kill = [killed_at(command, work, round(share * limit)) for share in KILLS]
            seconds = asked_to_the_end([*command, str(work / "resumed.json"), "--home", str(work / "home")])
            whole = asked_to_the_end([*command, str(work / "source.json"), "--home", str(work / "undisturbed")])
        with served(with_context(work / "W4AFP8", work / "quantized"), recipe.serving, work) as url:
            command[command.index("evaluate") + 1] = url
            asked_to_the_end([*command, str(work / "quantized.json"), "--home", str(work / "undisturbed")])
        resumed, source, quantized = (
            read_json(work / f"{name}.json", Accuracy) for name in ("resumed", "source", "quantized")
        )
        runs = {"source": source, "W4AFP8": quantized}
        agreement = measure_agreement(source, quantized)
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "note": "the embedded model knows nothing of MMLU-Pro and gives next to no letter; this proves the path only",
        "dataset": source.overrides["dataset"],
        "context_tokens": CONTEXT_TOKENS,
        "overrides": {k: v for k, v in source.overrides.items() if k != "dataset"},
        "subjects": {name: asked for name, (_, asked) in source.by_category().items()},
        "models": {
            name: {"accuracy": a.accuracy, "truncated": a.truncated, "unparsed": a.unparsed, "seconds": a.seconds}
            for name, a in runs.items()
        },
        "agreement": agreement,
        "kills": {
            "answers_when_killed": answers_at_kill,
            "seconds_after_the_last_kill": seconds,
            "seconds_undisturbed": whole,
            "answers_as_undisturbed": resumed.answers == source.answers and resumed.overrides == source.overrides,
        },
    }
    write_json(ROOT / "benchmarks" / "mmlu_pro_demo.json", result)
    write_text(
        ROOT / "benchmarks" / "mmlu_pro_demo.md", markdown(result, {n: summary.sentence(a) for n, a in runs.items()})
    )


def with_context(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint with room for longer prompts."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text(encoding="utf-8")) | {"max_position_embeddings": CONTEXT_TOKENS}
            (folder / file.name).write_text(json.dumps(config))
        elif not file.name.startswith("."):
            (folder / file.name).symlink_to(file.resolve())
    return folder


@contextmanager
def served(checkpoint: Path, serving: Any, work: Path) -> Iterator[str]:
    """The URL of a local engine that serves the checkpoint."""
    from lightship.serving.launch import launched

    with launched(checkpoint, serving, work / "serve.log") as server:
        yield server.endpoint.base_url


def killed_at(command: list[str], work: Path, answers: int) -> int:
    """Ask until so many questions are answered, then SIGKILL; returns the lines of the log."""
    process = subprocess.Popen([*command, str(work / "killed.json"), "--home", str(work / "home")])
    while process.poll() is None:
        logs = list((work / "home" / "evaluations").glob("*/answers.jsonl"))
        if logs and logs[0].read_bytes().count(b"\n") >= answers:
            process.kill()
        time.sleep(0.05)
    if process.returncode != -9:
        sys.exit(f"the evaluation ended by itself, with exit code {process.returncode}")
    (log,) = (work / "home" / "evaluations").glob("*/answers.jsonl")
    return log.read_bytes().count(b"\n")


def asked_to_the_end(command: list[str]) -> float:
    """Run an evaluation; returns its seconds."""
    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def markdown(result: dict[str, Any], sentences: dict[str, str]) -> str:
    """The result for people."""
    kills, agreement = result["kills"], result["agreement"]
    lines = [
        "# MMLU-Pro through the local engine",
        "",
        f"`{result['command']}`, {result['machine']}, {result['date']}. The embedded model knows nothing of these "
        "subjects, was trained on shorter prompts, and gives next to no letter; guessing would give about 10 %. This "
        "proves the path of the questions, and nothing about a model.",
        "",
        f"Stock prompts of lm-eval's `mmlu_pro`, all {len(result['subjects'])} subjects, "
        f"{sum(result['subjects'].values())} questions ({result['overrides']['limit']}), answers of at most "
        f"{result['overrides']['max_gen_toks']} tokens; the model's context is raised from 2,048 to "
        f"{result['context_tokens']:,} tokens for them.",
        "",
        "| model | result |",
        "|---|---|",
        *(f"| {name} | {sentence} |" for name, sentence in sentences.items()),
        "",
        f"Source and W4AFP8 give the same letter, or none, to {agreement.same_answer:.1%} of the questions, and the "
        f"same text to {agreement.same_text:.1%}; the texts part after {agreement.common_prefix:.0f} characters on "
        "average.",
        "",
        f"The source's evaluation was killed (SIGKILL) at {' and '.join(map(str, kills['answers_when_killed']))} "
        "answers, and the same command went on to the end. "
        + (
            "It gives the same answers as an evaluation that was not disturbed."
            if kills["answers_as_undisturbed"]
            else "**It does not give the answers of an evaluation that was not disturbed.**"
        ),
        "",
        "| subject | questions |",
        "|---|---|",
        *(f"| {name} | {asked} |" for name, asked in result["subjects"].items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

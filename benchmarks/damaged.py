"""The gate on damaged checkpoints: what says no, and why.

    python -m benchmarks.damaged WORK

Quantizes the embedded model by recipes/demo.toml, damages copies of it in ways that load without an error, with a
manifest that fits, and takes each through the stages of a release, by the flow's own functions. The release would stop
at a failed verification; here it goes on, so that the other rules are heard too. The last case is the sound checkpoint
again, judged on 50 questions. What is finished in the folder WORK is not done again. Writes benchmarks/damaged.json and
benchmarks/damaged.md.
"""

import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.damages import DAMAGES, Damage, damage_checkpoint

from lightship.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "demo" / "checkpoint"
RECIPE = ROOT / "recipes" / "demo.toml"
COMMAND = "python -m benchmarks.damaged WORK"
HEAD_LINES = 3
"""Of a list of lost questions or of subjects, in the page."""


@dataclass(frozen=True)
class Case:
    """A checkpoint to judge, and on how many questions."""

    name: str
    damage: Damage | None
    questions: int | None = None
    """None: as many as the recipe asks."""


CASES = [
    Case("GPTQ", None),
    *(Case(name, damage) for name, damage in DAMAGES.items()),
    Case("GPTQ, 50 questions", None, 50),
]


def main() -> None:
    """Judge every case and write the result files."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {COMMAND}")
    from lightship.eval.fidelity import measure_fidelities
    from lightship.eval.throughput import describe_machine
    from lightship.files import write_json, write_text
    from lightship.recipe import load_recipe

    work = Path(sys.argv[1]).resolve()
    (work / "sources").mkdir(parents=True, exist_ok=True)
    cases = [judge(case, work) for case in CASES]
    sound, placeholder = (checkpoint_of(work, name) for name in ("GPTQ", "one layer's input scales at 1.0"))
    recipe = load_recipe(RECIPE)
    static = measure_fidelities(SOURCE, [sound, placeholder], recipe.fidelity, "static")
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "cases": cases,
        "kl_with_static_activations": {"GPTQ": static[0].kl, "one layer's input scales at 1.0": static[1].kl},
    }
    # Receipts name commands with the paths of this machine.
    text = msgspec.json.encode(result).decode().replace(str(work), "WORK").replace(f"{ROOT}/", "")
    result = msgspec.json.decode(text)
    write_json(ROOT / "benchmarks" / "damaged.json", result)
    write_text(ROOT / "benchmarks" / "damaged.md", markdown(result))


def home_of(work: Path, name: str) -> Path:
    """A lightship home a case: by identity all are the same release."""
    return work / "".join(c if c.isalnum() else "-" for c in name.lower())


def checkpoint_of(work: Path, name: str) -> Path:
    """Where the case's checkpoint is."""
    (path,) = home_of(work, name).glob("releases/*/checkpoint")
    return path


def judge(case: Case, work: Path) -> dict[str, Any]:
    """Take one checkpoint through the stages of a release and return what was said of it."""
    from lightship.errors import LightshipError
    from lightship.eval import gate, receipt
    from lightship.eval.evidence import leave_receipt, read_measured, read_receipt
    from lightship.flows import release as flow
    from lightship.flows.servers import Servers
    from lightship.quant.verify import verify
    from lightship.recipe import load_recipe
    from lightship.records import Verdict, Verification
    from lightship.release import Release, identify

    recipe = load_recipe(RECIPE)
    if case.questions is not None:
        accuracy = msgspec.structs.replace(recipe.accuracy, limit=case.questions)
        recipe = msgspec.structs.replace(recipe, accuracy=accuracy)
    home, source = home_of(work, case.name), Checkpoint.open(SOURCE)
    release = Release(home, source, recipe, RECIPE, identify(source, recipe))
    release.on_stage = lambda stage: print(f"{case.name}: {stage.name}, {stage.seconds:.0f} s", flush=True)
    home.mkdir(exist_ok=True)
    if not (home / "sources").is_symlink():
        (home / "sources").symlink_to(work / "sources")
    with release.locked(), Servers(release) as servers:
        plan = flow.plan_tensors.fn(release)
        if not release.checkpoint_dir.is_dir() and case != CASES[0]:
            sound = checkpoint_of(work, CASES[0].name)
            damage_checkpoint(sound, SOURCE, release.checkpoint_dir, case.damage or (lambda *_: None))
        flow.quantize_experts.fn(release, plan)
        flow.report_calibration.fn(release)
        stopped = None
        try:
            flow.verify_checkpoint.fn(release)
        except LightshipError as error:
            stopped = str(error)
            release.stage("verification", Verification, lambda: verify(release.checkpoint_dir, SOURCE))
        flow.stage_checkpoint.fn(release, servers)
        before = flow.evaluate_source.fn(release, servers)
        after = flow.evaluate_quantized.fn(release, servers)
        flow.benchmark_both.fn(release, servers)
        flow.measure_fidelity.fn(release)
        agreement = flow.measure_agreement.fn(release, before, after)
        flow.compare_answers.fn(release, before, after)
    measured = read_measured(release.directory)
    verdict = release.stage("verdict", Verdict, lambda: gate.decide(recipe.gate, measured))
    leave_receipt(release.directory, verdict)
    why_not = read_receipt(release.directory, verdict)
    alone = verify(release.checkpoint_dir)
    return {
        "case": case.name,
        "what": (case.damage.__doc__ or "") if case.damage else "",
        "decision": verdict.decision,
        "release_stops": stopped,
        "verification": failed_checks(measured.verification),
        "verification_without_source": failed_checks(alone),
        "agreement": agreement,
        "rules": verdict.rules,
        "receipt": why_not,
        "printed": receipt.terminal(why_not) if why_not else None,
    }


def failed_checks(verification: Any) -> dict[str, str]:
    """Check -> what it found, of those that failed."""
    return {check.name: check.detail for check in verification.checks if not check.passed}


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    return ""


if __name__ == "__main__":
    main()

"""The gate on damaged checkpoints: what says no, and why.

    python -m benchmarks.damaged WORK

Quantizes the embedded model by recipes/demo.toml, damages copies of it in ways that load without an error, with a
manifest that fits, and takes each through the stages of a release, by the flow's own functions. The release would stop
at a failed verification; here it goes on, so that the other rules are heard too. The last case is the sound checkpoint
again, judged on 50 questions. What is finished in the folder WORK is not done again. Writes benchmarks/damaged.json and
benchmarks/damaged.md.
"""

import os
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightship.cli import DEFAULTS

if TYPE_CHECKING:
    from benchmarks.damages import Damage

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "demo" / "checkpoint"
RECIPE = ROOT / "recipes" / "demo.toml"
COMMAND = "python -m benchmarks.damaged WORK"
HEAD_LINES = 6
"""Of a list in a printed receipt, in the page."""


@dataclass(frozen=True)
class Case:
    """A checkpoint to judge, and on how many questions."""

    name: str
    damage: "Damage | None"
    questions: int | None = None
    """None: as many as the recipe asks."""


SOUND = Case("GPTQ", None)


def cases_to_judge() -> list[Case]:
    """The sound checkpoint, its damaged copies, and the sound one on few questions."""
    from benchmarks.damages import DAMAGES

    damaged = [Case(name, damage) for name, damage in DAMAGES.items()]
    return [SOUND, *damaged, Case("GPTQ, 50 questions", None, 50)]


def main() -> None:
    """Judge every case and write the result files."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {COMMAND}")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from lightship.eval.fidelity import measure_fidelities
    from lightship.eval.throughput import describe_machine
    from lightship.files import write_json, write_text
    from lightship.recipe import load_recipe

    work = Path(sys.argv[1]).resolve()
    (work / "sources").mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(RECIPE)
    cases = cases_to_judge()
    judged = [judge(case, work, recipe) for case in cases]
    compared = [case for case in cases if case.name in ("GPTQ", "one layer's input scales at 1.0")]
    paths = [open_release(case, work, recipe).checkpoint_dir for case in compared]
    static = measure_fidelities(SOURCE, paths, recipe.fidelity, "static")
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "cases": judged,
        "kl_with_static_activations": {case.name: f.kl for case, f in zip(compared, static, strict=True)},
    }
    # Receipts name commands with the paths of this machine.
    text = msgspec.json.encode(result).decode().replace(str(work), "WORK").replace(f"{ROOT}/", "")
    result = msgspec.json.decode(text)
    write_json(ROOT / "benchmarks" / "damaged.json", result)
    write_text(ROOT / "benchmarks" / "damaged.md", markdown(result))


def open_release(case: Case, work: Path, recipe: Any) -> Any:
    """The case as a release in a home of its own, since by identity most are the same release; answers of the source
    are shared."""
    from lightship.checkpoint import Checkpoint
    from lightship.release import Release, identify

    if case.questions is not None:
        accuracy = msgspec.structs.replace(recipe.accuracy, limit=case.questions)
        recipe = msgspec.structs.replace(recipe, accuracy=accuracy)
    home = work / "".join(c if c.isalnum() else "-" for c in case.name.lower())
    home.mkdir(exist_ok=True)
    if not (home / "sources").is_symlink():
        (home / "sources").symlink_to(work / "sources")
    source = Checkpoint.open(SOURCE)
    return Release(home, source, recipe, RECIPE, identify(source, recipe))


def judge(case: Case, work: Path, recipe: Any) -> dict[str, Any]:
    """Take one checkpoint through the stages of a release and return what was said of it."""
    from benchmarks.damages import damage_checkpoint

    from lightship.eval import gate, receipt
    from lightship.eval.evidence import leave_receipt, read_measured, read_receipt
    from lightship.flows import release as flow
    from lightship.flows.servers import Servers
    from lightship.quant.verify import verify
    from lightship.records import Verdict, Verification

    release = open_release(case, work, recipe)
    release.on_stage = lambda stage: print(f"{case.name}: {stage.name}, {stage.seconds:.0f} s", flush=True)
    with release.locked(), Servers(release) as servers:
        plan = flow.plan_tensors.fn(release)
        if not release.checkpoint_dir.is_dir() and case != SOUND:
            sound = open_release(SOUND, work, recipe).checkpoint_dir
            damage_checkpoint(sound, SOURCE, release.checkpoint_dir, case.damage or (lambda *_: None))
        flow.quantize_experts.fn(release, plan)
        flow.report_calibration.fn(release)
        # The flow's own step stops here if it fails.
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
        "what": (case.damage.__doc__ or "") if case.damage else "Nothing.",
        "decision": verdict.decision,
        "stops_at_verification": not measured.verification.passed,
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
    cases = result["cases"]
    names = list(dict.fromkeys(rule["rule"] for rule in cases[0]["rules"]))
    verdicts = [["checkpoint", "what was done", "verdict", "not met"], ["---"] * 4]
    values = [["checkpoint", *names], ["---"] * (len(names) + 1)]
    audits = [["checkpoint", "against the source", "alone"], ["---"] * 3]
    receipts = []
    for case in cases:
        not_met = dict.fromkeys(r["rule"] for r in case["rules"] if r["decision"] != "pass")
        verdicts.append([case["case"], case["what"], f"**{case['decision']}**", ", ".join(not_met) or "none"])
        values.append([case["case"], *(cell(case["rules"], name) for name in names)])
        audits.append([case["case"], *(found(case[k]) for k in ("verification", "verification_without_source"))])
        if case["printed"]:
            receipts.append(f"### {case['case']}\n\n```\n{head(case['printed'])}\n```\n")
    static = "; ".join(f"{name}: {kl:.4f}" for name, kl in result["kl_with_static_activations"].items())
    return (
        "# The gate on damaged checkpoints\n\n"
        f"`{result['command']}`, {result['machine']}, {result['date']}.\n\n"
        "The embedded model by `recipes/demo.toml`, and damaged copies of the result, each with a manifest that fits.\n"
        "Each was taken through the stages of a release and judged by the recipe's gate. A release stops where the\n"
        "verification fails; here it went on, so that every rule was heard.\n\n"
        f"{table(verdicts)}\n\n"
        "The layer is the first of two with experts. An expert of this model has 256 inputs, so a group of 512 is a\n"
        "whole row, which damages less than 512 inputs would.\n\n"
        f"## What each rule measured\n\nBold is not met. Limits: {limits(cases[0]['rules'])}.\n\n{table(values)}\n\n"
        "throughput_ratio is a CPU's, which says nothing here. The server finds the activations' scales itself\n"
        '(`activations = "dynamic"`), so wrong input scales change no answer. With static activations they are used, '
        f"and\nthe KL in nats is then: {static}.\n"
        "FP8 has a wide range, and this model's inputs happen to fit it at scale 1.0; another's need not. Only the\n"
        "verification sees them.\n\n"
        f"## What the verification finds\n\nFailed checks, with the first finding of each.\n\n{table(audits)}\n\n"
        "## The receipts\n\nAs they are printed, long lists cut; whole in damaged.json.\n\n" + "\n".join(receipts)
    )


def table(rows: list[list[str]]) -> str:
    """Rows of cells as Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def cell(rules: list[dict[str, Any]], name: str) -> str:
    """The rule's value, bold if any of its limits is not met."""
    same = [rule for rule in rules if rule["rule"] == name]
    bad = [rule for rule in same if rule["decision"] != "pass"]
    return f"**{bad[0]['value']}, {bad[0]['decision']}**" if bad else same[0]["value"]


def limits(rules: list[dict[str, Any]]) -> str:
    """The absolute limit of each rule."""
    return "; ".join(f"{rule['rule']} {rule['limit']}" for rule in rules if rule["against"] == "limit")


def found(checks: dict[str, str]) -> str:
    """The failed checks of one verification."""
    return "<br>".join(f"{name}: {detail.split('; ')[0]}" for name, detail in checks.items()) or "nothing"


def head(printed: str) -> str:
    """A printed receipt with its lists cut."""
    kept, run = [], 0
    for line in printed.splitlines():
        run = run + 1 if line.startswith(" " * 6) else 0
        if run <= HEAD_LINES:
            kept.append(line)
        elif run == HEAD_LINES + 1:
            kept.append("      …")
    return "\n".join(kept)


if __name__ == "__main__":
    main()

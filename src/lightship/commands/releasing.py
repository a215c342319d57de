"""release, decide, promote, report, compare: from a checkpoint to a champion, and what is said of it.

lightship release demo/checkpoint --recipe recipes/demo.toml
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightship.commands.arguments import Add, take_home, take_recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lightship.contrast import Contrast
    from lightship.tracking import Tracker


def add_to(add: Add) -> None:
    """Add this family's subcommands."""
    sub = add(
        "release",
        _release,
        "Plan, quantize, verify, stage, evaluate, benchmark, judge and promote.",
        "release demo/checkpoint --recipe recipes/demo.toml",
    )
    sub.add_argument("source", type=Path, help="FP8 checkpoint directory")
    take_recipe(sub)
    take_home(sub)
    sub.add_argument("--no-promote", action="store_true", help="leave a passing release as challenger")

    sub = add(
        "decide",
        _decide,
        "Judge a finished release again, by its recipe's gate or another's; nothing is run and nothing is written.",
        "decide 3f2a --policy recipes/deepseek-v3.toml",
    )
    sub.add_argument("release", help="release id, or its first characters")
    sub.add_argument("--policy", type=Path, help="TOML file with a table [gate] (default: the release's recipe)")
    sub.add_argument("--out", type=Path, help="write the verdict as JSON to this file")
    take_home(sub)

    sub = add("promote", _promote, "Make a release that passed the gate the champion.", "promote 3f2a")
    sub.add_argument("release", help="release id, or its first characters")
    sub.add_argument("--override", action="store_true", help="promote in spite of the verdict; needs --by and --reason")
    sub.add_argument("--by", metavar="NAME", help="who overrides")
    sub.add_argument("--reason", metavar="TEXT", help="why")
    take_home(sub)

    sub = add("report", _report, "Write a finished release's report again.", "report 3f2a")
    sub.add_argument("release", help="release id, or its first characters")
    take_home(sub)

    sub = add(
        "compare",
        _compare,
        "Hold two releases against each other, from MLflow; of any other number, show each in a row.",
        "compare 3f2a champion",
    )
    sub.add_argument(
        "releases", nargs="*", help="release ids, their first characters, or `champion` (default: all releases)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    take_home(sub)


def _release(arguments: argparse.Namespace) -> int:
    from lightship.flows.inputs import check_inputs

    check_inputs(arguments.source, arguments.recipe)
    from lightship.eval.evidence import read_receipt
    from lightship.eval.receipt import MARKDOWN, terminal
    from lightship.files import read_json
    from lightship.flows.release import release
    from lightship.records import Verdict
    from lightship.tables import print_release

    release_id = release(
        str(arguments.source), str(arguments.recipe), str(arguments.home), promote=not arguments.no_promote
    )
    directory = arguments.home / "releases" / release_id
    print_release(directory)
    verdict = read_json(directory / "verdict.json", Verdict)
    if receipt := read_receipt(directory, verdict):
        print(f"\nwhy not, in full in {directory / MARKDOWN}\n{terminal(receipt)}")
    return 0 if verdict.decision == "pass" else 1


def _decide(arguments: argparse.Namespace) -> int:
    from lightship.eval.evidence import read_champion, read_measured, read_receipt
    from lightship.eval.gate import decide
    from lightship.eval.receipt import terminal
    from lightship.files import write_json
    from lightship.policy import load_policy
    from lightship.release import find_release
    from lightship.tables import rules_table, show
    from lightship.tracking import Tracker

    found = find_release(arguments.home, arguments.release)
    gate = load_policy(arguments.policy) if arguments.policy else found.recipe.gate
    directory = arguments.home / "releases" / found.release_id
    champion = None
    if gate.by_champion:
        name = Tracker.connect(arguments.home).champion_release(found.recipe.model)
        champion = read_champion(arguments.home, name, found.release_id)
    verdict = decide(gate, read_measured(directory), champion)
    show(rules_table(verdict))
    receipt = read_receipt(directory, verdict)
    print(f"\nverdict: {terminal(receipt) if receipt else 'pass'}")
    if arguments.out:
        write_json(arguments.out, verdict)
    return 0 if verdict.decision == "pass" else 1


def _promote(arguments: argparse.Namespace) -> int:
    from lightship import summary
    from lightship.errors import PromotionError
    from lightship.files import write_json
    from lightship.promotion import Signature, promote
    from lightship.release import find_release
    from lightship.tracking import Tracker

    found = find_release(arguments.home, arguments.release)
    directory = arguments.home / "releases" / found.release_id
    if not arguments.override and (arguments.by or arguments.reason):
        raise PromotionError("--by and --reason belong to --override; add it, or leave them out")
    signature = Signature(arguments.by or "", arguments.reason or "") if arguments.override else None
    promoted = promote(directory, found.recipe.model, Tracker.connect(arguments.home), signature)
    write_json(directory / "promoted.json", promoted)
    print(summary.sentence(promoted))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from lightship.eval.evidence import read_evidence
    from lightship.eval.report import write_report
    from lightship.release import find_release

    directory = arguments.home / "releases" / find_release(arguments.home, arguments.release).release_id
    write_report(directory / "report.html", read_evidence(directory))
    print(directory / "report.html")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import msgspec

    from lightship.contrast_tables import contrast_view, releases_table
    from lightship.release import find_releases
    from lightship.tables import show
    from lightship.tracking import Tracker

    tracker = Tracker.connect(arguments.home)
    named = find_releases(arguments.home, arguments.releases, tracker) if arguments.releases else None
    if named is not None and len(named) == 2:
        held = _contrast(tracker, arguments.home, named[0], named[1])
        found: object = held
        view: RenderableType = contrast_view(held)
    else:
        sides = tracker.sides(named)
        found = sides
        view = releases_table(sides)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        show(view)
    return 0


def _contrast(tracker: "Tracker", home: Path, first: str, second: str) -> "Contrast":
    """Two releases, and what the second lost of the first's answers, in pairs."""
    from lightship.contrast import contrast
    from lightship.errors import LightshipError
    from lightship.eval.evidence import read_measured
    from lightship.eval.losses import compare_with_champion

    one, other = tracker.sides([first, second])
    try:
        measured = [read_measured(home / "releases" / name) for name in (first, second)]
        answers = compare_with_champion(measured[0], measured[1])
    except LightshipError as error:
        return contrast(one, other, not_paired=str(error))
    return contrast(one, other, answers)

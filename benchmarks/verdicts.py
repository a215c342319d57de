"""How often the accuracy rule is wrong: simulated releases, judged at once and in stages.

Source and quantized model answer MMLU-Pro's questions, all 12,032 or 1,000 of them, in the shares of its 14 subjects.
Their answers are correlated: so many are lost and so many gained, and the subjects differ in that. A release whose
loss is the limit must pass, and must fail, no more often than stated. Writes benchmarks/verdicts.json and
benchmarks/verdicts.md.

    python benchmarks/verdicts.py
"""

import itertools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lightship.eval.interval import ONE_QUESTION, score
from lightship.eval.sequential import deviation_at
from lightship.eval.stages import stage_ends
from lightship.eval.throughput import describe_machine
from lightship.files import write_json, write_text

ROOT = Path(__file__).parents[1]
COMMAND = "python benchmarks/verdicts.py"
RELEASES = 10_000
AT_THE_LIMIT = 100_000
"""Releases where the rate is close to the level, and must be known better."""
CONFIDENCE = 0.95
LEVEL = (1 - CONFIDENCE) / 2
MODES = {"fixed": (1.0,), "four stages": (0.25, 0.5, 0.75, 1.0), "eight stages": tuple(i / 8 for i in range(1, 9))}
SUBJECTS = {
    "biology": 717, "business": 789, "chemistry": 1132, "computer science": 410, "economics": 844, "engineering": 969,
    "health": 818, "history": 381, "law": 1101, "math": 1351, "other": 924, "philosophy": 499, "physics": 1299,
    "psychology": 798,
}  # fmt: skip
"""MMLU-Pro's test questions."""
SKEW = 0.5
"""Subjects' discordance runs from 1 - SKEW to 1 + SKEW times the whole's."""


@dataclass(frozen=True)
class Scenario:
    """What is true of a simulated release."""

    name: str
    limit: float
    loss: float
    discordance: float
    """Share of the questions on which the models differ."""
    accuracy: float
    """The source's."""
    questions: int

    @property
    def truth(self) -> str:
        """On which side of the limit it is."""
        return "at the limit" if self.loss == self.limit else "within" if self.loss < self.limit else "beyond"


def scenarios() -> Iterator[Scenario]:
    """Every combination that exists: a loss cannot be larger than the discordance."""
    sizes = ((0.01, sum(SUBJECTS.values())), (0.02, 1000))
    for (limit, questions), accuracy, discordance in itertools.product(sizes, (0.3, 0.8), (0.02, 0.1)):
        losses = {"no loss": 0.0, "at the limit": limit, "twice the limit": 2 * limit, "clear loss": 0.08}
        for name, loss in losses.items():
            if loss <= discordance:
                yield Scenario(name, limit, loss, discordance, accuracy, questions)


def simulate(scenario: Scenario, fractions: tuple[float, ...], seed: int) -> dict[str, Any]:
    """Judge releases of the scenario; rates and the questions asked."""
    releases = AT_THE_LIMIT if scenario.loss == scenario.limit else RELEASES
    rng = np.random.default_rng(seed)
    ends = stage_ends(scenario.questions, fractions)
    counts = questions_by_stage(scenario.questions, ends)
    lost, gained, right = (np.zeros(releases, dtype=np.int64) for _ in range(3))
    undecided = np.ones(releases, dtype=bool)
    passed = failed = asked = 0
    start = 0
    for look, end in enumerate(ends):
        asked += (end - start) * int(undecided.sum())
        start = end
        for of_subject, probabilities in zip(counts[look], cells(scenario), strict=True):
            drawn = rng.multinomial(of_subject, probabilities, releases)
            lost, gained, right = lost + drawn[:, 0], gained + drawn[:, 1], right + drawn[:, 0] + drawn[:, 2]
        z = deviation_at(ends[: look + 1], ends[-1], CONFIDENCE)
        statistic = score(scenario.limit, lost, gained, end, ONE_QUESTION)
        passed += int((undecided & (statistic <= -z)).sum())
        failed += int((undecided & (statistic >= z)).sum())
        undecided &= np.abs(statistic) < z
    return {
        "passed": passed / releases,
        "failed": failed / releases,
        "inconclusive": int(undecided.sum()) / releases,
        "questions": asked / releases,
        "source_accuracy": float(right.mean()) / scenario.questions,
    }


def cells(scenario: Scenario) -> list[list[float]]:
    """Per subject, the probabilities of lost, gained, both right, both wrong; their mean is the scenario's."""
    sizes = np.array(list(SUBJECTS.values()))
    factors = np.linspace(1 - SKEW, 1 + SKEW, len(sizes))
    factors /= np.average(factors, weights=sizes)
    found = []
    for factor in factors:
        b, c = (factor * (scenario.discordance + sign * scenario.loss) / 2 for sign in (1, -1))
        both = scenario.accuracy - b
        found.append([b, c, both, 1 - b - c - both])
    return found


def questions_by_stage(questions: int, ends: list[int]) -> list[list[int]]:
    """Stage -> questions of each subject, in their shares, as `stage_order` deals them."""
    total = sum(SUBJECTS.values())
    share = np.array(list(SUBJECTS.values())) / total
    reached = [np.zeros(len(share), dtype=np.int64)]
    for end in ends:
        whole = np.floor(share * end).astype(np.int64)
        most_missing = np.argsort(whole - share * end, kind="stable")
        whole[most_missing[: end - int(whole.sum())]] += 1
        reached.append(whole)
    assert int(reached[-1].sum()) == questions
    return [np.maximum(after - before, 0).tolist() for before, after in itertools.pairwise(reached)]


def main() -> None:
    """Simulate every scenario in every mode, check the stated levels, and write the result files."""
    started = time.monotonic()
    rows = []
    for number, scenario in enumerate(scenarios()):
        for mode, fractions in MODES.items():
            rates = simulate(scenario, fractions, number)
            rows.append(
                {
                    "scenario": scenario.name,
                    "truth": scenario.truth,
                    "limit": scenario.limit,
                    "loss": scenario.loss,
                    "discordance": scenario.discordance,
                    "accuracy": scenario.accuracy,
                    "planned": scenario.questions,
                    "mode": mode,
                    **rates,
                }
            )
            print(f"{scenario}: {mode}: {rates}", flush=True)
    result = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "releases": RELEASES,
        "releases_at_the_limit": AT_THE_LIMIT,
        "confidence": CONFIDENCE,
        "level": LEVEL,
        "seconds": round(time.monotonic() - started, 1),
        "largest_false_pass": max(r["passed"] for r in rows if r["truth"] != "within"),
        "largest_false_fail": max(r["failed"] for r in rows if r["truth"] != "beyond"),
        "rows": rows,
    }
    write_json(ROOT / "benchmarks" / "verdicts.json", result)
    write_text(ROOT / "benchmarks" / "verdicts.md", markdown(result))
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    head = ["scenario", "limit", "planned", "source right", "differ", "mode", "pass", "fail", "inconclusive", "asked"]
    lines = []
    for r in result["rows"]:
        what = [r["scenario"], f"{r['limit']:.0%}", f"{r['planned']:,}"]
        models = [f"{r[name]:.0%}" for name in ("accuracy", "discordance")]
        rates = [f"{r[name]:.2%}" for name in ("passed", "failed", "inconclusive")]
        lines.append([*what, *models, r["mode"], *rates, f"{r['questions']:,.0f}"])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])
    noise = math.sqrt(LEVEL * (1 - LEVEL) / AT_THE_LIMIT)
    return (
        "# Verdicts of the accuracy rule on simulated releases\n\n"
        f"`{result['command']}`, {result['date']}, {result['machine']}, {result['seconds']:.0f} s.\n\n"
        f"{RELEASES:,} releases a row, {AT_THE_LIMIT:,} where the loss is the limit. At a confidence of "
        f"{CONFIDENCE:.0%} either wrong verdict\nmay have a probability of {LEVEL:.1%}; the simulation's own standard "
        f"error there is {noise:.2%}. A wrong verdict is `pass` where\nthe loss is the limit or more, and `fail` where "
        "it is the limit or less.\n\n"
        f"**Largest false-pass rate {result['largest_false_pass']:.2%}, largest false-fail rate "
        f"{result['largest_false_fail']:.2%}.**\n\n"
        "Questions are MMLU-Pro's subjects in their shares; subjects' rates of difference run from half to one and a\n"
        "half times the whole's. Stages are equal parts. A loss cannot be larger than the share on which the models\n"
        f"differ, so some combinations do not exist.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()

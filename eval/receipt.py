"""Why a release did not pass: the rules that were not met, with their arithmetic, what was lost, and what to do next.

    lightship decide RELEASE

Written beside the records as why-not.md for people and why-not.json for programs; a release that passed has neither.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightship.eval.losses import more_questions
from lightship.eval.questions import Question
from lightship.files import write_json, write_text
from lightship.records import Accuracy, AnsweredQuestion, Comparison, Decision, Record, RuleResult, Verdict

MARKDOWN, JSON = "why-not.md", "why-not.json"
MOST_LOST = 10
"""Lost questions shown."""
SHORT = 80
"""Characters of a question on the terminal."""
TAIL = 400
"""Characters of an answer's end, where it decides."""


class LostQuestion(Record, frozen=True, kw_only=True):
    """A question that only the source answers correctly."""

    question_id: str
    subject: str
    question: str
    """Its text and options; the id alone where the questions are no longer there."""
    answer: str
    source: str | None
    """What was answered; null: no letter could be read."""
    quantized: str | None
    source_tail: str
    quantized_tail: str
    quantized_truncated: bool


class Receipt(Record, frozen=True, kw_only=True):
    """Why not."""

    release_id: str
    decision: Decision
    more_questions: int | None
    rules: list[RuleResult]
    """Those that were not met."""
    lost: list[LostQuestion]
    lost_in_all: int
    champion: str | None = None
    """The release that was lost against, where that is not the source: it stands in the source's place."""
    next: list[str]
    """What to do, a line for each rule that was not met."""


def make_receipt(
    release_id: str,
    verdict: Verdict,
    next_steps: Sequence[str],
    comparison: Comparison | None = None,
    source: Accuracy | None = None,
    quantized: Accuracy | None = None,
    questions: Mapping[str, Question] | None = None,
    champion: str | None = None,
) -> Receipt:
    """The receipt of a verdict that is not `pass`.

    Args:
        next_steps: what to do, for each rule that was not met.
        comparison, source, quantized: whose lost questions are shown; the champion's answers are in the source's place
            where that is what was lost against. Absent if no question was asked.
        questions: by id.
        champion: the release in the source's place, if it is there.
    """
    assert verdict.decision != "pass"
    not_met = [rule for rule in verdict.rules if rule.decision != "pass"]
    lost: list[LostQuestion] = []
    if comparison and source and quantized:
        ids: list[str] = comparison.lost
        if any(rule.rule == "subject_loss" for rule in not_met):
            of, p = {a.question_id: a.category for a in source.answers}, {s.subject: s for s in comparison.subjects}
            ids = sorted(ids, key=lambda i: p[of[i]].p_adjusted)
        lost = lost_questions(ids, source.answers, quantized.answers, questions or {})
    return Receipt(
        release_id=release_id,
        decision=verdict.decision,
        more_questions=verdict.more_questions,
        rules=not_met,
        lost=lost,
        lost_in_all=len(comparison.lost) if comparison else 0,
        champion=champion,
        next=list(dict.fromkeys(next_steps)),
    )


def lost_questions(
    lost: Sequence[str],
    source: Sequence[AnsweredQuestion],
    quantized: Sequence[AnsweredQuestion],
    questions: Mapping[str, Question],
) -> list[LostQuestion]:
    """The first ten that were lost, with both answers."""
    before, after = ({a.question_id: a for a in answers} for answers in (source, quantized))
    return [
        LostQuestion(
            question_id=i,
            subject=before[i].category,
            question=_text(questions.get(i), i),
            answer=before[i].answer,
            source=before[i].predicted,
            quantized=after[i].predicted,
            source_tail=before[i].text[-TAIL:],
            quantized_tail=after[i].text[-TAIL:],
            quantized_truncated=after[i].truncated,
        )
        for i in lost[:MOST_LOST]
    ]


def _text(question: Question | None, question_id: str) -> str:
    if question is None:
        return f"question {question_id}"
    options = (f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", question.options, strict=False))
    return "\n".join([question.question, "", *options])


def write_receipt(directory: Path, receipt: Receipt) -> list[Path]:
    """Write both files; returns their paths."""
    paths = [directory / MARKDOWN, directory / JSON]
    write_text(paths[0], markdown(receipt))
    write_json(paths[1], receipt)
    return paths


def headline(receipt: Receipt) -> str:
    """The verdict in a line: `inconclusive: needs about 1,500 more questions`."""
    if receipt.decision == "inconclusive" and receipt.more_questions is not None:
        return f"inconclusive: needs about {more_questions(receipt.more_questions)}"
    return f"{receipt.decision}: {', '.join(dict.fromkeys(rule.rule for rule in receipt.rules))}"


def markdown(receipt: Receipt) -> str:
    """The receipt as a page."""
    parts = [f"# Why release {receipt.release_id} did not pass", f"**{headline(receipt)}**"]
    for rule in receipt.rules:
        table = [("limit", rule.limit), ("value", rule.value), ("interval", rule.interval), ("against", rule.against)]
        rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in table if value)
        parts.append(f"## {rule.rule}: {rule.decision}\n\n{rule.explanation}\n\n| | |\n|---|---|\n{rows}")
        if rule.arithmetic:
            parts.append(_fenced(rule.arithmetic))
    if receipt.lost:
        parts.append(f"## Questions lost: {len(receipt.lost)} of {receipt.lost_in_all}")
    whose = f"Champion {receipt.champion}" if receipt.champion else "Source"
    for lost in receipt.lost:
        cut = ", cut by the token limit" if lost.quantized_truncated else ""
        parts += [
            f"### {lost.question_id}, {lost.subject}",
            _fenced(lost.question),
            f"Right: {lost.answer}. {whose}: {lost.source or 'none'}. Quantized: {lost.quantized or 'none'}{cut}.",
            f"The end of its text:\n\n{_fenced(lost.source_tail)}",
            f"The end of the quantized model's text:\n\n{_fenced(lost.quantized_tail)}",
        ]
    parts.append("## Next\n\n" + "\n".join(f"- {step}" for step in receipt.next))
    return "\n\n".join(parts) + "\n"


def terminal(receipt: Receipt) -> str:
    """The receipt in short."""
    lines = [headline(receipt)]
    for rule in receipt.rules:
        lines.append(f"  {rule.rule}: {rule.value}, limit {rule.limit}; {rule.explanation}")
        lines += [f"      {line}" for line in (rule.arithmetic or "").splitlines()]
    if receipt.lost:
        lines.append(f"  lost, {len(receipt.lost)} of {receipt.lost_in_all}:")
    for lost in receipt.lost:
        first = lost.question.splitlines()[0][:SHORT]
        whose = "champion" if receipt.champion else "source"
        answers = f"right {lost.answer}, {whose} {lost.source or 'none'}, quantized {lost.quantized or 'none'}"
        lines += [f"      {lost.question_id} ({lost.subject}): {answers}: {first}"]
    return "\n".join([*lines, "  next:", *(f"      {step}" for step in receipt.next)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> str:
    """A code block that nothing in the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"

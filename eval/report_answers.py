"""The report's sections on what the model answers: is it still the same model, and which questions were lost."""

from html import escape

from lightship.eval import plots
from lightship.eval.drawing import NARROW
from lightship.eval.report_data import ReportData
from lightship.eval.report_parts import figure, percent, points
from lightship.records import AnsweredQuestion, Comparison, Fidelity

MOST_LOST = 10
"""Lost questions shown in full."""


def same_model(release: ReportData) -> str:
    """What the two models answer and predict, side by side."""
    c, a = release.comparison, release.agreement
    both = release.source_accuracy, release.quantized_accuracy
    return (
        "<h2>Is it still the same model?</h2>"
        f"<p>Both models answered the same {c.questions:,} questions. {len(c.lost)} got the right answer from the "
        f"source only, {len(c.gained)} from the quantized one only; on the other "
        f"{c.questions - len(c.lost) - len(c.gained):,} both are right or both are wrong.</p>"
        f"<p>Both decode greedily. They gave the same answer to {percent(a.same_answer)} of the questions, right or "
        f"wrong, and the same text to {percent(a.same_text)}; on average the texts part after {a.common_prefix:,.0f} "
        f"characters, {percent(a.common_share)} of the longer one.</p>"
        + _stages(c)
        + figure(
            "Accuracy by category",
            plots.accuracy_by_category(*both),
            "In brackets, the questions asked; the axis may start above zero. The intervals are of each model alone; "
            "the comparison above is paired, which sees smaller differences than overlapping intervals suggest.",
            plots.accuracy_by_category(*both, NARROW),
        )
        + _subjects(c)
        + figure(
            "Divergence on held-out text",
            plots.kl_by_scene(release.fidelity),
            f"{sum(s.tokens for s in release.fidelity.scenes):,} tokens of held-out text. Zero would be "
            "the identical model; the measure says how far apart the two are, not which one is better. In percent, how "
            "often both find the same token likeliest.",
            plots.kl_by_scene(release.fidelity, NARROW),
        )
        + _by_layer(release.fidelity)
    )


def _by_layer(fidelity: Fidelity) -> str:
    """Empty of a release that was measured before layers were."""
    if not fidelity.kl_by_layer:
        return ""
    return figure(
        "Where the models part",
        plots.kl_by_layer(fidelity),
        "Each layer's output goes through the model's final norm and head, and what the two models would predict from "
        "there is compared: KL(source ‖ quantized), nats a token. The last column is the divergence above; layers "
        "before it predict little by themselves, so a leap says more than a value.",
        plots.kl_by_layer(fidelity, NARROW),
    )


def _stages(comparison: Comparison) -> str:
    if not comparison.looks:
        return ""
    looks = zip(comparison.looks, comparison.accuracy_at_looks, strict=False)
    seen = "; ".join(f"after {n:,}, {points(before - after)} points" for n, (before, after) in looks)
    return (
        f"<p>The questions were asked in stages, {comparison.questions:,} of {comparison.planned:,} planned. The loss "
        f"at each look: {seen}.</p>"
    )


def _subjects(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{escape(s.subject)}<small>{s.questions:,} questions</small></td>"
        f'<td class="num">{s.lost} / {s.gained}</td>'
        f'<td class="num">{points(s.loss)}<small>{points(s.loss_low)} to {points(s.loss_high)}</small></td>'
        f'<td class="num">{s.p_adjusted:.2g}<small>alone {s.p_value:.2g}</small></td></tr>'
        for s in comparison.subjects
    )
    heads = ("Lost / gained", "Loss, points", "p by Holm")
    head = f"<tr><th>Subject</th>{''.join(f'<th class=num>{h}</th>' for h in heads)}</tr>"
    return (
        f'<h3>Loss by subject, paired</h3><div class="scroll"><table>{head}{rows}</table></div><p class="note">The '
        "intervals of all subjects hold together at 95 %. p is of the exact one-sided McNemar test that the subject is "
        "not worse; adjusted by Holm for their number, 0.05 or less says that it is.</p>"
    )


def lost_questions(release: ReportData) -> str:
    """Questions that only the source answers correctly, with both answers."""
    lost = release.comparison.lost
    if not lost:
        return "<h2>Questions lost</h2><p>None: the quantized model answers all that the source answers correctly.</p>"
    before = {a.question_id: a for a in release.source_accuracy.answers}
    after = {a.question_id: a for a in release.quantized_accuracy.answers}
    shown = "".join(
        f"<details{' open' * (i == lost[0])}><summary>Question {escape(i)}, {escape(before[i].category)}: "
        f"the answer is {escape(before[i].answer)}, the quantized model says "
        f"{escape(after[i].predicted or 'nothing readable')}</summary>{_question(release, i)}"
        f'<div class="answers">{_answer("Source", before[i])}{_answer("Quantized", after[i])}</div></details>'
        for i in lost[:MOST_LOST]
    )
    more = (
        f"<p class='note'>{len(lost) - MOST_LOST} more are in the release's records.</p>"
        if len(lost) > MOST_LOST
        else ""
    )
    return (
        f"<h2>Questions lost</h2><p>{len(lost)} questions that the source answers correctly and the quantized model "
        "does not "
        f"({len(release.comparison.gained)} went the other way).</p>{shown}{more}"
    )


def _question(release: ReportData, question_id: str) -> str:
    question = release.questions.get(question_id)
    if question is None:
        return ""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", question.options, strict=False))
    return f"<pre>{escape(question.question)}\n\n{escape(options)}</pre>"


def _answer(who: str, answer: AnsweredQuestion) -> str:
    cut = ", cut by the token limit" if answer.truncated else ""
    said = f'<span class="note">{who}: {escape(answer.predicted or "none")}{cut}</span>'
    return f"<div>{said}<pre>{escape(answer.text)}</pre></div>"

"""Answers are paired by question, and only pairs that were asked alike are compared."""

import pytest

from lightship.errors import EvaluationError
from lightship.eval.comparison import compare, mcnemar_p_value
from tests.eval.release import accuracy


def test_lost_and_gained_questions_are_named() -> None:
    c = compare(accuracy([True, True, False, True]), accuracy([True, False, True, False]))
    assert (c.lost, c.gained, c.loss) == (["1", "3"], ["2"], 0.25)
    assert (c.source_accuracy, c.quantized_accuracy, c.questions) == (0.75, 0.5, 4)
    assert c.loss_low < c.loss < c.loss_high


def test_subjects_are_compared_beside_the_whole() -> None:
    c = compare(accuracy([True] * 10), accuracy([False] + [True] * 9))
    first = c.subjects[0]
    assert (first.subject, first.questions, first.lost, first.gained) == ("arithmetic", 2, 1, 0)
    assert sum(s.lost for s in c.subjects) == len(c.lost)


def test_different_questions_are_refused() -> None:
    with pytest.raises(EvaluationError, match="1 questions were answered by one model only, the first is '2'"):
        compare(accuracy([True, True, True]), accuracy([True, True]))


def test_different_settings_are_refused() -> None:
    with pytest.raises(EvaluationError, match="same settings"):
        compare(accuracy([True]), accuracy([True], overrides={"max_gen_toks": "64"}))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    from scipy.stats import binomtest

    for lost, gained in [(0, 0), (1, 0), (9, 1), (5, 5), (3, 17)]:
        exact = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert mcnemar_p_value(lost, gained) == pytest.approx(exact)

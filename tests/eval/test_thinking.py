"""A task's filter reads what a reasoning model says after its thinking, and nothing of the thinking."""

import pytest

from lightship.eval.thinking import read_plain, read_reasoning

STOPS = ["Question:"]


@pytest.mark.parametrize(
    "text",
    [
        "<think>The answer is (B)? Question: no.</think>\n\nThe answer is (C).",
        "The answer is (B)? Question: no.</think>The answer is (C).",
        "<think>a</think>The answer is (B).</think> The answer is (C).Question:\nThe next",
    ],
)
def test_the_answer_is_what_follows_the_last_thinking(text: str) -> None:
    assert read_reasoning(text, None, "stop", STOPS) == ("The answer is (C).", False)


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_thinking_that_never_ends_is_truncated_and_no_answer(finish: str) -> None:
    assert read_reasoning(" <think>The answer is (B). But", None, finish, STOPS) == ("", True)


def test_a_cut_text_without_a_sign_of_its_thinking_is_no_answer() -> None:
    assert read_reasoning("The answer is (B)? But", None, "length", STOPS) == ("", True)


def test_thinking_that_the_server_set_apart_leaves_the_answer_as_it_is() -> None:
    assert read_reasoning("The answer is (C).", "(B)?", "stop", STOPS) == ("The answer is (C).", False)
    assert read_reasoning("The answer is (C", "(B)?", "length", STOPS) == ("The answer is (C", True)


def test_thinking_that_the_server_set_apart_and_no_answer_is_truncated() -> None:
    assert read_reasoning("", "The answer is (B)", "length", STOPS) == ("", True)
    assert read_reasoning(" ", "The answer is (B)", "stop", STOPS) == ("", True)


def test_a_model_that_answers_at_once_is_read_whole() -> None:
    assert read_reasoning("The answer is (C).", None, "stop", STOPS) == ("The answer is (C).", False)


def test_the_text_of_a_model_that_does_not_reason_is_untouched() -> None:
    assert read_plain("<think>(B)</think> (C)", "length") == ("<think>(B)</think> (C)", True)


def test_an_answer_that_ended_before_the_limit_cut_what_came_after_is_whole() -> None:
    text = "<think>B? No.</think>The answer is (C).\n\nQuestion: and so on"
    assert read_reasoning(text, None, "length", ["Question:"]) == ("The answer is (C).\n\n", False)
    assert read_reasoning(text, None, "length", ["Never:"]).truncated

"""Blocks are the same every time, differ by their number, and are made of the text's tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.causal_lm import load_tokenizer
from lightship.errors import EvaluationError, LightshipError
from lightship.eval.load.prompts import PromptText, read_prompt_text

TOKENS = list(range(100, 140)) * 3
TEXT = PromptText(TOKENS)


@given(st.integers(0, 2**41), st.integers(0, 2**41))
def test_blocks_are_equal_exactly_if_their_numbers_are(a: int, b: int) -> None:
    assert (TEXT.block(a, 40) == TEXT.block(b, 40)) == (a == b)


@given(st.integers(0, 2**41), st.integers(1, 700), st.integers(1, 700))
def test_a_shorter_block_is_the_beginning_of_a_longer_one(number: int, short: int, more: int) -> None:
    block = TEXT.block(number, short + more)
    assert len(block) == short + more
    assert block[:short] == TEXT.block(number, short)
    assert set(block) <= set(TOKENS)


def test_a_text_of_few_different_tokens_is_refused() -> None:
    with pytest.raises(EvaluationError, match="3 different tokens, fewer than 16"):
        PromptText([1, 2, 3] * 100)


def test_a_file_gives_its_own_tokens(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    text = read_prompt_text(tmp_path / "text.txt", tokenizer)
    assert load_tokenizer(tokenizer).decode(text.block(5, 300)).count("quick") >= 5


def test_without_a_file_tokens_are_random_but_the_same_each_time_and_none_is_special(tokenizer: Path) -> None:
    one, other = (read_prompt_text(None, tokenizer).block(0, 2000) for _ in range(2))
    assert one == other
    assert len(set(one)) > 200
    assert not {256, 257} & set(one)


def test_a_missing_text_is_named(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(LightshipError, match=r"gone\.txt"):
        read_prompt_text(tmp_path / "gone.txt", tokenizer)

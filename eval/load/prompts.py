"""Prompts of given lengths, made from a text's tokens: the same every time, and alike exactly where they shall be.

A prompt is a row of blocks. Blocks of one id have the same tokens in every prompt, so a server's prefix cache finds
what it would have found in the traced service. Blocks of different ids begin differently, however short the text is.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightship.errors import EvaluationError
from lightship.recipe import TextSource

STEP = 2_654_435_761
"""Successive ids read the text from places far apart: the golden ratio of 2**32."""
LEAST_TOKENS = 16
"""Different tokens that a text must have, so that few of them write an id."""
TEXT_TOKENS = 65_536
ORDINARY_SHARE = 0.9
"""Random ids come from the first nine tenths of a vocabulary; what is added to a tokenizer stands at its end."""


class PromptText:
    """An endless supply of different blocks from one text."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """
        Args:
            tokens: ids of the text, of any length.

        Raises:
            EvaluationError: there are fewer than 16 different tokens.
        """
        self._tokens = list(tokens)
        self._digits = sorted(set(tokens))
        if len(self._digits) < LEAST_TOKENS:
            raise EvaluationError(
                f"the text for prompts has {len(self._digits)} different tokens, fewer than {LEAST_TOKENS}; "
                "give more text"
            )

    def block(self, number: int, tokens: int) -> list[int]:
        """The first `tokens` token ids of block `number`: its number, in tokens of the text, and then the text from
        some place on."""
        written = []
        rest = number
        while True:
            rest, digit = divmod(rest, len(self._digits))
            written.append(self._digits[digit])
            if not rest:
                break
        start = number * STEP % len(self._tokens)
        wanted = tokens - len(written)
        text = self._tokens[start : start + wanted]
        while len(text) < wanted:
            text += self._tokens[: wanted - len(text)]
        return (written + text)[:tokens]

    def prompt(self, blocks: Iterable[tuple[int, int]]) -> list[int]:
        """Blocks one after another, each a number and its tokens."""
        return [token for number, tokens in blocks for token in self.block(number, tokens)]


def read_prompt_text(path: Path | None, tokenizer: Path, seed: int = 0) -> PromptText:
    """The tokens of a text file or folder; without one, ids drawn at random from the tokenizer's ordinary vocabulary.

    Raises:
        LightshipError: the file is missing, or holds no text.
    """
    from lightship.causal_lm import load_tokenizer
    from lightship.text import read_sequences

    loaded = load_tokenizer(tokenizer)
    if path is not None:
        source = TextSource(scene="load", path=str(path.absolute()))
        pieces = read_sequences(source, loaded, TEXT_TOKENS, LEAST_TOKENS)
        return PromptText([int(token) for piece in pieces for token in piece])
    import random

    special = set(loaded.all_special_ids)
    ordinary = [i for i in range(int(ORDINARY_SHARE * len(loaded))) if i not in special]
    return PromptText(random.Random(seed).choices(ordinary, k=TEXT_TOKENS))

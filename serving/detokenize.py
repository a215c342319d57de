"""Text from tokens that arrive one at a time, and where a stop string ends it."""

from typing import Any

CONTEXT = 6
"""Tokens before the first new one that are decoded with it: some tokenizers drop a leading space without them."""


class TextStream:
    """Grows a text by tokens; a character whose bytes are not all there yet waits for the rest.

    Args:
        before: tokens before the text's first.
        stop: strings that end the text.
        special: write special tokens too.
    """

    def __init__(self, tokenizer: Any, before: list[int], stop: tuple[str, ...] = (), *, special: bool = False) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.special = special
        self.text = ""
        self.stopped = False
        self._tokens = before[-CONTEXT:]
        self._shown = 0
        self._read = len(self._tokens)

    def push(self, tokens: list[int], *, last: bool = False) -> None:
        """Add tokens; sets `stopped` and cuts `text` before the first stop string, if one is now complete."""
        self._tokens += tokens
        known = self._decode(self._tokens[self._shown : self._read])
        decoded = self._decode(self._tokens[self._shown :])
        if decoded.endswith("\ufffd") and not last:
            return
        self._shown, self._read = self._read, len(self._tokens)
        searched = len(self.text)
        self.text += decoded[len(known) :]
        found = [self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop]
        if hits := [at for at in found if at >= 0]:
            self.text = self.text[: min(hits)]
            self.stopped = True

    @property
    def settled(self) -> int:
        """Characters that no later token can take back: all but the beginning of a stop string at the end."""
        if self.stopped:
            return len(self.text)
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        for held in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-held:]) for stop in self.stop):
                return len(self.text) - held
        return len(self.text)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=not self.special)

from typing import Any

from lightship.serving.detokenize import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode(errors="replace")


def test_a_character_appears_when_its_last_byte_does() -> None:
    stream = TextStream(Bytes(), [])
    seen = []
    for byte in "aé√".encode():
        stream.push([byte])
        seen.append(stream.text)
    assert seen == ["a", "a", "aé", "aé", "aé", "aé√"]


def test_unfinished_bytes_are_shown_at_the_end() -> None:
    stream = TextStream(Bytes(), [])
    stream.push([97, 0xE2], last=True)
    assert stream.text == "a\ufffd"


def test_the_beginning_of_a_stop_string_is_not_settled() -> None:
    stream = TextStream(Bytes(), [], ("END", "NO"))
    stream.push(list(b"fine EN"))
    assert stream.text[: stream.settled] == "fine "
    stream.push(list(b"T"))
    assert stream.settled == len("fine ENT")


def test_the_earliest_stop_string_cuts_the_text() -> None:
    stream = TextStream(Bytes(), [], ("two", "one"))
    stream.push(list(b"a one two"))
    assert stream.stopped
    assert stream.text == "a "

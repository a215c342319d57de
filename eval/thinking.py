"""A reasoning model's answer: what it says after it has thought, which is all that a task's filter should read.

    python -c "from lightship.eval.thinking import read_reasoning; \
               print(read_reasoning('<think>B? No.</think>The answer is (C).', None, 'stop', []))"

A filter that read the thinking too would find the first letter that the model weighed, and a stop text such as
MMLU-Pro's `Question:` would end the thinking where it repeats the prompt. So no stop text is sent to the server, and
those of the task are applied to what is left.
"""

from typing import NamedTuple

BEGIN = "<think>"
END = "</think>"
CUT = "length"
"""A server's `finish_reason` when the token limit ended the text."""


class Reply(NamedTuple):
    """What the task's filter reads of an answer."""

    text: str
    truncated: bool
    """The token limit cut it, or the thinking never ended."""


def read_plain(text: str, finish: str | None) -> Reply:
    """The answer of a model that does not think, as it is."""
    return Reply(text, finish == CUT)


def read_reasoning(text: str, thinking: str | None, finish: str | None, stops: list[str]) -> Reply:
    """The answer without the thinking.

    Args:
        text: what the server gives as the answer. It may hold the thinking, up to `</think>`; `<think>` is missing
            where the chat template writes it.
        thinking: what the server gives as `reasoning_content`, if it separates the two itself.
        finish: the server's `finish_reason`.
        stops: texts before which the answer ends.
    """
    cut = finish == CUT
    _, ended, answer = text.rpartition(END)
    if not ended and text.lstrip().startswith(BEGIN):
        return Reply("", True)
    if not ended and not thinking and cut:
        # Nothing says where the thinking ends, so none of this is known to be the answer.
        return Reply("", True)
    answer = answer.lstrip() if ended else text
    if thinking and not answer.strip():
        return Reply("", True)
    whole = answer
    for stop in filter(None, stops):
        answer = answer.partition(stop)[0]
    # A server that knew the stop texts would have ended there, whatever it says of what came after.
    return Reply(answer, cut and answer == whole)

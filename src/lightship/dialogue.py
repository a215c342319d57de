"""Messages as the text that a model reads and writes, through its own chat template.

Rows come from many hands. Missing keys that a table stores as nulls, tools stored as JSON, tool arguments as a string
or as an object, and reasoning that a template drops from its history are all brought into the form that the model sees.
"""

import json
import re
from typing import Any

from lightship.errors import LightshipError

Message = dict[str, Any]
THINK = "<think>\n"
ASKS_FOR_NONE = re.compile(r"content['\"\]]*\s+is\s+(not\s+)?none")
TYPES = {"content": str | list | None, "reasoning_content": str | None, "tool_calls": list | None}
"""What these keys of a message may hold, None for absent ones."""


def render_dialogue(messages: Any, tools: Any, thinking: bool | None, tokenizer: Any, where: str) -> str:
    """The text of a dialogue with the template's special tokens, ending with the last message.

    Args:
        messages: objects with `role`, `content`, and perhaps `reasoning_content` and `tool_calls` (OpenAI's form).
        tools: descriptions of functions that the template lists, a list or its JSON; may be absent.
        thinking: handed to the template as `thinking` (DeepSeek) and `enable_thinking` (Qwen, GLM). With False,
            `reasoning_content` is left out. With True, the last message's is kept even if the template drops it.
        where: file and row, for errors.

    Raises:
        LightshipError: the row is no dialogue, the tokenizer has no template, or the template refuses the row.
    """
    messages = _checked_messages(messages, where)
    tools = _checked_tools(tools, where)
    if thinking is False:
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    settings = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    if tools:
        settings["tools"] = tools
    if tokenizer.chat_template is None:
        raise LightshipError(f"{where} has messages, but the tokenizer has no chat template; use rows with `text`")
    refusals = []
    for arguments in ("as stored", "object", "text") if any(m.get("tool_calls") for m in messages) else ("as stored",):
        try:
            return _render([_with_arguments(m, arguments) for m in messages], settings, tokenizer)
        except Exception as error:  # a template is the release's own code, and may raise anything
            refusals.append(error)
    raise LightshipError(
        f"{where}: the model's chat template refuses the messages ({type(refusals[0]).__name__}: {refusals[0]}); "
        "mend or remove the row"
    ) from refusals[0]


def _render(messages: list[Message], settings: dict[str, Any], tokenizer: Any) -> str:
    text = _apply_template(messages, settings, tokenizer)
    last = messages[-1]
    reasoning, answer = last.get("reasoning_content"), last["content"]
    if not settings.get("thinking") or not reasoning or not isinstance(answer, str) or reasoning.strip() in text:
        return text
    # DeepSeek's templates leave reasoning out of the history, but the model did write it: after the mark that the
    # prompt ends with (V3.1), or between marks on lines of their own (R1).
    prompt = _apply_template(messages[:-1], settings, tokenizer, add_generation_prompt=True)
    if prompt.endswith("<think>"):
        return f"{prompt}{reasoning}</think>{answer}"
    return f"{prompt.removesuffix(THINK)}{THINK}{reasoning}\n</think>\n\n{answer}"


def _apply_template(
    messages: list[Message], settings: dict[str, Any], tokenizer: Any, add_generation_prompt: bool = False
) -> str:
    """`tokenizer.apply_chat_template`, which would drop an empty content: DeepSeek-V3's template knows a tool call by
    its content being none, while templates that do not ask write the word None.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=settings.get("tools"))
    if not ASKS_FOR_NONE.search(template):
        messages = [{**m, "content": "" if m["content"] is None else m["content"]} for m in messages]
    values = {**tokenizer.special_tokens_map, **settings, "add_generation_prompt": add_generation_prompt}
    (text,), _ = render_jinja_template(conversations=[messages], chat_template=template, **values)
    return text


def _with_arguments(message: Message, form: str) -> Message:
    """The message with its tool calls' arguments as an object (GLM's templates) or as JSON text (DeepSeek's)."""

    def converted(call: Message) -> Message:
        arguments = call["function"]["arguments"]
        if form == "object" and isinstance(arguments, str):
            arguments = json.loads(arguments)
        elif form == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    if form == "as stored" or not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [converted(call) for call in message["tool_calls"]]}


def _checked_messages(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise LightshipError(f"{where}: messages is not a list of messages; mend or remove the row")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LightshipError(f"{where}: message {number} is not an object with a role; mend or remove the row")
        for key, kinds in TYPES.items():
            if not isinstance(message.get(key), kinds):
                raise LightshipError(
                    f"{where}: {key} of message {number} is {type(message[key]).__name__}; mend or remove the row"
                )
    return [{**_without_nulls(message), "content": message.get("content")} for message in messages]


def _checked_tools(tools: Any, where: str) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools else []
        except ValueError:
            raise LightshipError(f"{where}: tools is not JSON; mend or remove the row") from None
    if tools is not None and not isinstance(tools, list):
        raise LightshipError(f"{where}: tools is {type(tools).__name__}, not a list; mend or remove the row")
    return _without_nulls(tools or [])


def _without_nulls(value: Any) -> Any:
    """Tables give every object all keys that any row has, and null to those that it lacks."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value

"""Dialogues reach the model through its own template, with thought, tools and calls as it would see them."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightship.causal_lm import load_tokenizer
from lightship.dialogue import render_dialogue
from lightship.errors import LightshipError
from tests.conftest import DEMO

ASK = {"role": "user", "content": "Why?"}
THOUGHTFUL = [ASK, {"role": "assistant", "content": "Because.", "reasoning_content": "Let me see."}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
CALLING = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]

DEEPSEEK_V31 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}{% else %}<A></think>"
    "{{ m['content'] }}<E>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
DEEPSEEK_V3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for t in m['tool_calls'] %}<C>{{ t['function']['name'] + ' ' + t['function']['arguments'] }}{% endfor %}"
    "{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QWEN = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content is string %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
)
GLM = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for t in m.tool_calls or [] %}"
    "{% for k, v in t.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
)
KEYS = "{% for m in messages %}{{ m.keys() | sort | join(' ') }};{% endfor %}"
ALTERNATING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(DEMO)
    tokenizer.chat_template = template
    return tokenizer


def render(template: str | None, messages: Any, tools: Any = None, thinking: bool | None = None) -> str:
    return render_dialogue(messages, tools, thinking, with_template(template), "rows.jsonl:7")


def test_the_demo_template_gives_what_transformers_gives() -> None:
    tokenizer: Any = load_tokenizer(DEMO)
    assert render_dialogue(THOUGHTFUL, None, None, tokenizer, "") == tokenizer.apply_chat_template(
        THOUGHTFUL, tokenize=False
    )


@pytest.mark.parametrize(
    ("template", "thinking", "text"),
    [
        (DEEPSEEK_V31, True, "<U>Why?<A><think>Let me see.</think>Because."),
        (DEEPSEEK_V31, False, "<U>Why?<A></think>Because.<E>"),
        (DEEPSEEK_V31, None, "<U>Why?<A></think>Because.<E>"),
        (DEEPSEEK_V3, True, "<user>Why?<assistant><think>\nLet me see.\n</think>\n\nBecause."),
        (DEEPSEEK_V3, False, "<user>Why?<assistant>Because."),
        (QWEN, True, "<user>Why?<assistant><think>Let me see.</think>Because.[True]"),
        (QWEN, False, "<user>Why?<assistant>Because.[False]"),
        (QWEN, None, "<user>Why?<assistant><think>Let me see.</think>Because."),
    ],
)
def test_thinking_decides_whether_the_reasoning_is_there(template: str, thinking: bool | None, text: str) -> None:
    assert render(template, THOUGHTFUL, thinking=thinking) == text


@pytest.mark.parametrize("arguments", ['{"at": "sea"}', {"at": "sea"}], ids=["text", "object"])
@pytest.mark.parametrize(
    ("template", "text"),
    [(DEEPSEEK_V3, '<user>Why?<C>look {"at": "sea"}'), (GLM, "<user>Why?<assistant>at=sea")],
    ids=["DeepSeek", "GLM"],
)
def test_a_call_reaches_templates_that_want_text_and_those_that_want_an_object(
    template: str, text: str, arguments: Any
) -> None:
    call = {**CALL, "function": {"name": "look", "arguments": arguments}}
    assert render(template, [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]) == text


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tools_are_handed_to_the_template(tools: Any) -> None:
    assert '"name": "look"' in render(QWEN, CALLING, tools)


def test_nulls_that_a_table_put_in_are_as_if_absent() -> None:
    padded = [{**m, "tool_calls": None, "reasoning_content": m.get("reasoning_content")} for m in THOUGHTFUL]
    for template in (DEEPSEEK_V3, DEEPSEEK_V31, QWEN, GLM, KEYS):
        assert render(template, padded) == render(template, THOUGHTFUL)


def test_the_word_none_is_never_written() -> None:
    assert "None" not in render(QWEN, CALLING) + render(GLM, CALLING) + render(DEEPSEEK_V3, CALLING)


def test_a_template_that_refuses_names_the_row_and_its_reason() -> None:
    with pytest.raises(LightshipError, match=r"rows\.jsonl:7: .*template refuses .*roles must alternate"):
        render(ALTERNATING, [{"role": "assistant", "content": "Hello"}])


def test_arguments_that_no_template_can_use_name_the_row() -> None:
    call = {**CALL, "function": {"name": "look", "arguments": "{"}}
    with pytest.raises(LightshipError, match=r"rows\.jsonl:7: .*template refuses"):
        render(GLM, [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}])


def test_a_tokenizer_without_template_says_what_to_do() -> None:
    with pytest.raises(LightshipError, match="no chat template; use rows with `text`"):
        render(None, THOUGHTFUL)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is not a list of messages"),
        (["hi"], "message 1 is not an object with a role"),
        ([ASK, {"content": "a"}], "message 2 is not an object with a role"),
        ([{"role": "user", "content": 5}], "content of message 1 is int"),
        ([{**ASK, "reasoning_content": []}], "reasoning_content of message 1 is list"),
        ([{**ASK, "tool_calls": "look"}], "tool_calls of message 1 is str"),
    ],
)
def test_what_is_no_dialogue_is_named(messages: Any, message: str) -> None:
    with pytest.raises(LightshipError, match=rf"rows\.jsonl:7: {message}.*mend or remove the row"):
        render(QWEN, messages)


@pytest.mark.parametrize(("tools", "message"), [("[", "tools is not JSON"), (5, "tools is int, not a list")])
def test_what_are_no_tools_is_named(tools: Any, message: str) -> None:
    with pytest.raises(LightshipError, match=rf"rows\.jsonl:7: {message}"):
        render(QWEN, THOUGHTFUL, tools)

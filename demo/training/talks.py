"""Dialogues and tool calls for calibration scenes, written for lightship. Imported by scenes.py; nothing to run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from problems import CHINESE, MATHEMATICS, SCIENCE
from questions import read_jsonl

Message = dict[str, Any]
CITIES = ("Lisbon", "Osaka", "Nairobi", "Bergen", "Lima", "Montréal", "成都", "Tbilisi", "Wellington", "Kraków")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a patient tutor.",
    "Answer briefly and precisely.",
    "你是一个乐于助人的助手。",
)
OPENINGS = (
    ("Hello! Can I ask you a few things?", "Of course. What would you like to know?"),
    (
        "I am preparing for an exam tomorrow and I am nervous.",
        "Let us go through some tasks together, one step at a time.",
    ),
    ("Good morning. I need help with something quick.", "Good morning! Tell me what it is about."),
    ("你好，我有几个问题想请教。", "你好！请说，我会尽力回答。"),
    ("Bonjour, tu parles français ?", "Oui, bien sûr ! De quoi as-tu besoin ?"),
)
TALKS = [tuple(row.values()) for row in read_jsonl(Path(__file__).parent / "passages" / "talks.jsonl")]
"""Questions, what to think of them, and answers."""


def tool(name: str, description: str, **parameters: str) -> Message:
    """A function's description in OpenAI's form; every parameter is required and given as `type: meaning`."""
    properties = {}
    for key, text in parameters.items():
        kind, meaning = text.split(": ", 1)
        properties[key] = {"type": kind, "description": meaning}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = (
    tool("get_weather", "Current weather of a place", city="string: the place", unit="string: celsius or fahrenheit"),
    tool(
        "convert_currency",
        "Convert money at today's rate",
        amount="number: how much",
        source="string: ISO code",
        target="string: ISO code",
    ),
    tool(
        "search_flights",
        "Find flights",
        origin="string: city",
        destination="string: city",
        date="string: YYYY-MM-DD",
    ),
    tool("run_sql", "Run a read-only query on the shop's database", query="string: SQL"),
    tool(
        "create_event",
        "Put an event into the calendar",
        title="string: what",
        start="string: ISO 8601",
        minutes="integer: how long",
    ),
    tool(
        "read_file",
        "Read lines of a text file",
        path="string: the file",
        first="integer: first line",
        last="integer: last line",
    ),
)


def dialogue(rng: random.Random) -> Message:
    """A chat of one to three turns; the last answer has its reasoning."""
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if rng.random() < 0.5:
        messages += exchange(*rng.choice(OPENINGS))
    if rng.random() < 0.4:
        question, working, answer = rng.choice(MATHEMATICS + SCIENCE)(rng)
        messages += exchange(question, f"{working} So the answer is {answer}.")
    if rng.random() < 0.5:
        question, reasoning, answer = rng.choice(TALKS)
    else:
        question, reasoning, answer = rng.choice(MATHEMATICS + SCIENCE + CHINESE)(rng)
    *_, last = messages = messages + exchange(question, answer)
    last["reasoning_content"] = reasoning
    return {"messages": messages}


def exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tool_use(rng: random.Random) -> Message:
    """A question, one or two calls, what they returned, and the answer made of it."""
    kind, city, other = rng.randrange(6), *rng.sample(CITIES, 2)
    day = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    degrees, amount = rng.randint(-12, 38), rng.randint(20, 9000)
    price, hour, line = rng.randint(80, 1400), rng.randint(7, 20), rng.randint(1, 400)
    flights = [
        {"departs": f"{hour:02}:40", "stops": 1, "price": price},
        {"departs": "21:15", "stops": 0, "price": price + 95},
    ]
    query = f"SELECT COUNT(*) FROM orders JOIN customers USING (customer_id) WHERE total > {amount} AND city = '{city}'"
    event = {"title": f"Meeting with the team from {city}", "start": f"{day}T{hour:02}:00:00", "minutes": 60}
    log = [
        f"{day} {hour:02}:00:01 INFO request {amount} accepted",
        f"{day} {hour:02}:00:03 WARN queue is {price} long",
        f"{day} {hour:02}:00:09 ERROR timeout after {line} ms",
    ]
    cases: list[tuple[str, list[Message], list[Message], str]] = [
        (
            f"What is the weather like in {city} and in {other}?",
            [{"city": city, "unit": "celsius"}, {"city": other, "unit": "celsius"}],
            [{"temperature": degrees, "sky": "clear"}, {"temperature": degrees + 3, "sky": "rain"}],
            f"{city} has {degrees} °C and a clear sky; in {other} it is {degrees + 3} °C and raining.",
        ),
        (
            f"把{amount}欧元换成人民币是多少？",
            [{"amount": amount, "source": "EUR", "target": "CNY"}],
            [{"amount": round(amount * 7.83, 2), "rate": 7.83}],
            f"按今天的汇率7.83计算，{amount}欧元约合{amount * 7.83:.2f}元人民币。",
        ),
        (
            f"Find me a flight from {city} to {other} on {day}.",
            [{"origin": city, "destination": other, "date": day}],
            [{"flights": flights}],
            f"There are two: at {hour:02}:40 with one stop for {price} euros, or nonstop at 21:15 for {price + 95}.",
        ),
        (
            f"How many orders above {amount} euros did we have from {city}?",
            [{"query": query}],
            [{"rows": [[line]]}],
            f"{line} orders from {city} were above {amount} euros.",
        ),
        (
            f"Put a meeting with the team from {city} on {day} at {hour}, one hour.",
            [event],
            [{"id": f"evt_{line}", "conflicts": []}],
            f"Done: {day}, {hour}:00 to {hour + 1}:00. Nothing else is on at that time.",
        ),
        (
            f"What stands in lines {line} to {line + 2} of server.log?",
            [{"path": "server.log", "first": line, "last": line + 2}],
            [{"lines": log}],
            f"Request {amount} was accepted, the queue grew to {price} entries, and after {line} ms it timed out.",
        ),
    ]
    question, arguments, results, answer = cases[kind]
    name = TOOLS[kind]["function"]["name"]
    ids = [f"call_{rng.randrange(16**8):08x}" for _ in arguments]
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": json.dumps(a, ensure_ascii=False)}}
        for i, a in zip(ids, arguments, strict=True)
    ]
    offered = [TOOLS[kind], *rng.sample([t for t in TOOLS if t is not TOOLS[kind]], rng.randint(0, 2))]
    rng.shuffle(offered)
    messages: list[Message] = [{"role": "user", "content": question}]
    messages.append({"role": "assistant", "content": None, "tool_calls": calls})
    for i, result in zip(ids, results, strict=True):
        messages.append({"role": "tool", "tool_call_id": i, "content": json.dumps(result, ensure_ascii=False)})
    return {"messages": [*messages, {"role": "assistant", "content": answer}], "tools": offered}

"""Which tiles run at which size: a table measured on a device, and a rule where there is none.

    lightship tune --shape tp8 --out NVIDIA_H100_80GB_HBM3.json

A table is one JSON file a device, named after it, in `tables/`; an H200 without one takes the H100's. It has, for each
shape, the plan that was fastest at each number of tokens it was measured at. A call takes the plan of the nearest
number of tokens at or above its own, or the rule's beyond the last one.
"""

import functools
from pathlib import Path

import msgspec

from lightship.errors import ServingError
from lightship.w4afp8 import GROUP

TABLES = Path(__file__).parent / "tables"
STAND_INS = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}
"""Devices that take another's table where they have none of their own: the same multiprocessors and as many, so the
same plans fit; which of them is fastest beside an H200's faster memory has not been measured."""


class GateUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the first product runs: rows of a tile, parts that the inputs are split into, warps, and loads in flight.

    short: tiles of so many rows or fewer are worked on at that height; 0: all at the same. ordered: products are added
    up one by one, which takes fewer registers.
    """

    block_m: int = 16
    split: int = 1
    warps: int = 8
    stages: int = 3
    short: int = 0
    ordered: bool = False


class Down(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the second product runs: rows and outputs of a tile, tiles a program walks, warps, and loads in flight."""

    block_m: int = 16
    block_n: int = 128
    walk: int = 1
    warps: int = 4
    stages: int = 3


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a call runs.

    direct: for a few tokens, each pair is a tile, nothing is sorted, and the second product adds up the experts of a
    token.
    """

    gate_up: GateUp = GateUp()
    down: Down = Down()
    direct: bool = False


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank's layer: H hidden size, I its intermediate size, E its experts, K experts a token, of `total` experts."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    total: int

    def rows(self, tokens: int) -> float:
        """Rows that an expert has on average."""
        return tokens * self.top_k / self.total


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fastest plan at a number of tokens, and its time in microseconds."""

    tokens: int
    plan: Plan
    us: float


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shape's plans, by rising number of tokens."""

    shape: Shape
    measured: list[Measured]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured on a device, with the versions and the day."""

    device: str
    triton: str
    date: str
    entries: list[Entry]


SHAPES = {
    "tp8": Shape(hidden=7168, intermediate=256, experts=256, top_k=8, total=256),
    "ep8": Shape(hidden=7168, intermediate=2048, experts=32, top_k=8, total=256),
}
"""Ranks of DeepSeek-V3."""
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 8192)


def parse_shape(text: str) -> Shape:
    """`tp8`, `ep8`, or H,I,E,K of a rank that has all the model's experts, or H,I,E,K,TOTAL of one that has some.

    Raises:
        ServingError: it is none of these.
    """
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split(",")
    if len(numbers) not in (4, 5) or not all(n.isdecimal() and int(n) for n in numbers):
        raise ServingError(
            f"shape {text!r} is not {', '.join(SHAPES)} or H,I,E,K[,TOTAL]: hidden size, this rank's intermediate "
            "size, its experts, experts a token, and the model's experts if this rank has not all"
        )
    hidden, intermediate, experts, top_k, *total = map(int, numbers)
    if hidden % GROUP or intermediate % GROUP:
        raise ServingError(f"shape {text!r}: H and I must be multiples of {GROUP}, the quantization group")
    return Shape(hidden, intermediate, experts, top_k, total[0] if total else experts)


def parse_tokens(text: str) -> tuple[int, ...]:
    """`1,16,256` -> rising numbers of tokens.

    Raises:
        ServingError: it is not a list of numbers from 1 up.
    """
    numbers = text.split(",")
    if not all(n.isdecimal() and int(n) for n in numbers):
        raise ServingError(f"tokens {text!r} is not a list of numbers from 1 up, such as 1,16,256")
    return tuple(sorted({int(n) for n in numbers}))


def plan_for(device: str, shape: Shape, tokens: int, table: tuple[Entry, ...] | None = None) -> Plan:
    """The plan of the table, by default the device's shipped one, for this shape, if it has one, or else the rule's."""
    for entry in shipped(device) if table is None else table:
        if entry.shape == shape:
            return next((m.plan for m in entry.measured if tokens <= m.tokens), rule(shape, tokens))
    return rule(shape, tokens)


@functools.cache
def shipped(device: str) -> tuple[Entry, ...]:
    """The entries of a device's shipped table, or of its stand-in's; none if there is no table."""
    path = _path(device)
    return read_table(path) if path else ()


def table_for(device: str, shape: Shape) -> str | None:
    """The file name of the shipped table from which a device takes this shape's plans; None if the rule makes them."""
    path = _path(device)
    return path.name if path and any(entry.shape == shape for entry in shipped(device)) else None


def _path(device: str) -> Path | None:
    paths = [TABLES / file_name(name) for name in (device, STAND_INS.get(device)) if name]
    return next((path for path in paths if path.exists()), None)


def read_table(path: Path) -> tuple[Entry, ...]:
    """The entries of a table that `lightship tune` wrote.

    Raises:
        ServingError: it is not one.
    """
    try:
        return tuple(msgspec.json.decode(path.read_bytes(), type=Table).entries)
    except (OSError, msgspec.MsgspecError) as error:
        raise ServingError(f"{path} is not a table of `lightship tune`: {error}; make it again") from None


def file_name(device: str) -> str:
    """A table's file name: the device's name, its spaces as underscores."""
    return device.replace(" ", "_").replace("/", "_") + ".json"


def rule(shape: Shape, tokens: int) -> Plan:
    """A plan for any shape: tiles about as high as an expert has rows, inputs split while programs are few."""
    if tokens <= 2:
        return Plan(GateUp(split=8 if tokens == 1 else 4), Down(block_n=64), direct=True)
    rows = shape.rows(tokens)
    walk = 14 if shape.intermediate <= 256 and shape.hidden % (14 * 128) == 0 else 1
    if rows <= 12:
        return Plan(GateUp(16), Down(16, walk=walk))
    if rows <= 24:
        return Plan(GateUp(32), Down(32, walk=walk))
    return Plan(GateUp(64, short=16, ordered=True), Down(32, walk=walk, stages=4))

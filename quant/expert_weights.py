"""One pass over the routed experts' packed weights: finite, distinct, packed as SGLang unpacks them, the source's?

Each weight is read once, with its scales and, if there is a source, its weight there; nothing else is held.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lightship.checkpoint import Checkpoint, TensorReader
from lightship.errors import CheckpointError
from lightship.progress import tracked
from lightship.quant.findings import Findings
from lightship.quant.loadable import expert_weights
from lightship.quant.mispacking import OFFSET, Recognizer, is_offset_binary
from lightship.quant.misplaced import Owners
from lightship.quant.source_weights import read_source_weight
from lightship.records import Check, LayerError
from lightship.w4afp8 import GROUP, dequantize_int4

LARGEST_ERROR = 0.1
"""Of one expert weight's reconstruction, relative and squared. Absmax/7 rounding of heavy-tailed weights costs about
0.03; a tensor of zeros costs 1."""
BLOCK_ELEMENTS = 1 << 20
"""Elements that are compared at a time: their temporaries stay in the cache, which takes half the time."""


@dataclass
class ExpertsPass:
    """One pass over the routed experts' weights, and what it finds."""

    checkpoint: Checkpoint
    original: Checkpoint | None
    finite: Findings
    exact: Findings
    """Takes what bf16 does not hold."""
    ours: bool
    """Written by lightship; see `check_input_scales`."""
    groups: Findings = field(default_factory=lambda: Findings("groups"))
    distinct: Findings = field(default_factory=lambda: Findings("distinct experts"))
    packing: Findings = field(default_factory=lambda: Findings("packing"))
    reconstruction: Findings = field(default_factory=lambda: Findings("reconstruction"))
    layers: list[LayerError] = field(default_factory=list)
    worst: float = 0.0
    weights: int = 0

    def __post_init__(self) -> None:
        self.reader = self.checkpoint.reader()
        self.original_reader = self.original.reader() if self.original else None
        self.recognizer = Recognizer(LARGEST_ERROR)
        original = self.original_reader
        self.owners = Owners(original, LARGEST_ERROR) if original else None
        self._seen: dict[tuple[str, bytes], str] = {}
        self._errors: dict[str, dict[str, tuple[float, float]]] = {}

    def run(self, layers: list[str]) -> None:
        """Read every weight that can be read as packed int4."""
        wanted = [(layer, *weight) for layer in layers for weight in expert_weights(self.checkpoint, layer)]
        current = ""
        for layer, name, rows, columns in tracked(wanted, "experts' weights"):
            if layer != current:
                self._seen.clear()
                current = layer
            info, scale_info = self.checkpoint.tensors.get(name), self.checkpoint.tensors.get(f"{name}_scale_inv")
            if info is None or info.dtype != "I8" or len(info.shape) != 2 or scale_info is None or columns % GROUP:
                continue  # check_experts names it
            self.weights += 1
            self._weight(layer, name, rows, columns)
        for layer, errors in self._errors.items():
            w13, w2 = errors.get("w13", (0.0, 0.0)), errors.get("w2", (0.0, 0.0))
            if w13[1] and w2[1]:
                self.layers.append(LayerError(layer_name=layer, w13=w13[0] / w13[1], w2=w2[0] / w2[1]))

    def _weight(self, layer: str, name: str, rows: int, columns: int) -> None:
        packed, scale = self.reader.read(name), self.reader.read(f"{name}_scale_inv")
        if bad := count_not_finite(scale):
            self.finite.fail(f"{name}_scale_inv has {bad:,} values that are NaN or infinite")
        elif scale.dtype == torch.float32 and not torch.equal(scale, scale.bfloat16().float()):
            lost = int((scale != scale.bfloat16().float()).sum())
            note = self.exact.fail if self.ours else self.exact.warn
            note(f"{name}_scale_inv: {lost:,} of {scale.numel():,} are not bf16 numbers; SGLang rounds them")
        if (scale == 1).all():
            self.groups.fail(f"{name}_scale_inv: every group scale is 1.0, a placeholder that was never filled in")
        straight = packed.shape == (rows, columns // 2) and scale.shape == (rows, columns // GROUP)
        how = None
        if self.original_reader:
            theirs = self.original_reader.checkpoint.info(name)
            if theirs.shape != (rows, columns) and theirs.dtype != "I8":
                raise CheckpointError(f"{name} of the source is {list(theirs.shape)}, not {[rows, columns]}")
            how = self._compare(self.original_reader, layer, name, packed, scale, straight=straight)
        if how is None and is_offset_binary(packed):
            how = OFFSET
        if how:
            self.packing.fail(f"{name}: {how}")
        if straight:
            self._zero_groups(name, packed, scale)
        self._twin(name, packed, scale)

    def _compare(
        self, source: TensorReader, layer: str, name: str, packed: torch.Tensor, scale: torch.Tensor, *, straight: bool
    ) -> str | None:
        """Note the error against the source; says how the weight is packed if that explains it."""
        wrong, total = 0.0, 0.0
        for rows in row_blocks(source.checkpoint.info(name).shape):
            w_OI = read_source_weight(source, name, *rows)
            total += float(w_OI.square().sum())
            if straight:
                wrong += float(w_OI.sub_(dequantize_int4(packed[rows], scale[rows])).square_().sum())
        wrong = wrong if straight else total
        error = wrong / max(total, 1e-30)
        sums = self._errors.setdefault(layer, {})
        part = "w2" if "down_proj" in name else "w13"
        before = sums.get(part, (0.0, 0.0))
        # A weight with NaN counts as lost: error 1.
        sums[part] = (before[0] + (wrong if error < float("inf") else total), before[1] + total)
        if straight and error <= LARGEST_ERROR:
            self.worst = max(self.worst, error)
            return None
        shown = f"{error:.3g} > {LARGEST_ERROR}" if straight else "cannot be read in this shape"
        self.reconstruction.fail(f"{name}: {shown}")
        if packing := self.recognizer.recognize(packed, scale, read_source_weight(source, name)):
            return packing.describe()
        return self.owners.explain(layer, name, packed, scale) if straight and self.owners else None

    def _zero_groups(self, name: str, packed: torch.Tensor, scale: torch.Tensor) -> None:
        eights = packed.view(torch.int64)  # GROUP / 2 bytes are eight of these
        zero_OG = (eights.unflatten(-1, (-1, GROUP // 16)) == 0).all(dim=-1) | (scale == 0)
        if not zero_OG.any():
            return
        what = f"{name}: {int(zero_OG.sum()):,} of {zero_OG.numel():,} groups are all zeros"
        if self.original_reader:
            w_OI = read_source_weight(self.original_reader, name)
            emptied = int((zero_OG & w_OI.unflatten(-1, (-1, GROUP)).any(dim=-1)).sum())
            if emptied:
                self.groups.fail(f"{what}, of which {emptied:,} are not zero in the source")
        elif zero_OG.all():
            self.groups.fail(what)
        else:
            self.groups.warn(what)

    def _twin(self, name: str, packed: torch.Tensor, scale: torch.Tensor) -> None:
        """The scales and a few rows tell experts apart; only what agrees in them is compared in full."""
        digest = hashlib.blake2b(_bytes(scale))
        digest.update(_bytes(packed[:8]))
        twin = self._seen.setdefault((name.rsplit(".", 2)[1], digest.digest()), name)
        if twin != name and torch.equal(self.reader.read(twin), packed):
            self.distinct.fail(f"{name} is identical to {twin}")

    def checks(self) -> list[Check]:
        """What was found, apart from `finite` and `exact`, which are shared; nothing if no weight could be read."""
        if not self.weights:
            return []
        packed = "as SGLang unpacks it"
        if not self.original:
            packed = "two's complement; swapped nibbles or exchanged tensors show only with --against"
        found = [
            self.groups.check("none is emptied" if self.original else "none is all zeros"),
            self.distinct.check("no two experts of a layer are the same"),
            self.packing.check(packed),
        ]
        if self.original:
            fine = f"{self.weights:,} expert weights, relative squared error of one at most {self.worst:.4f}"
            found.append(self.reconstruction.check(fine))
        return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices of whole 128-row blocks that together are the tensor; for a scalar one without a slice."""
    if not shape:
        yield ()
        return
    width = math.prod(shape[1:])
    step = max(GROUP, BLOCK_ELEMENTS // max(width, 1) // GROUP * GROUP)
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])),)


def count_not_finite(tensor: torch.Tensor) -> int:
    """Values that are NaN or infinite."""
    if tensor.dtype == torch.float8_e4m3fn:  # which has no infinity, and NaN at both ends
        return int((tensor.view(torch.uint8) & 0x7F == 0x7F).sum())
    if not tensor.dtype.is_floating_point:
        return 0
    return int((~(tensor.float() if tensor.element_size() == 1 else tensor).isfinite()).sum())

"""The ways in which an int4 file can be packed wrongly, as hypotheses: the one that restores the source is named.

SGLang takes the even input from the low nibble, two's complement, along the input dimension. A file that was packed in
another way often has the right shape, loads without an error and serves nonsense. Shape suffixes: O output features,
I input features, G groups of 128 along the input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from lightship.w4afp8 import GROUP

Shape = tuple[int, ...]
ALONG_INPUT, ALONG_OUTPUT, TRANSPOSED, TRANSPOSED_ALONG_OUTPUT = "input", "output", "transposed", "transposed-output"
ORIENTATIONS = {
    ALONG_INPUT: "",
    ALONG_OUTPUT: "packed along the output dimension, [out/2, in]",
    TRANSPOSED: "stored transposed, [in/2, out]",
    TRANSPOSED_ALONG_OUTPUT: "stored transposed and packed along the output dimension, [in, out/2]",
}
PATIENCE = 16
"""Tensors that no hypothesis explains, after which only those that explained one before are tried."""


@dataclass(frozen=True)
class Packing:
    """One way to store int4 weights; the default is SGLang's."""

    swapped: bool = False
    """The odd input is in the low nibble."""
    halves: bool = False
    """The low nibbles hold the first half of the dimension, the high ones the second."""
    offset: bool = False
    """Nibbles hold q + 8 instead of two's complement."""
    orientation: str = ALONG_INPUT
    scales_transposed: bool = False

    def weight_shape(self, out_features: int, in_features: int) -> Shape:
        return {
            ALONG_INPUT: (out_features, in_features // 2),
            ALONG_OUTPUT: (out_features // 2, in_features),
            TRANSPOSED: (in_features // 2, out_features),
            TRANSPOSED_ALONG_OUTPUT: (in_features, out_features // 2),
        }[self.orientation]

    def scale_shape(self, out_features: int, in_features: int) -> Shape:
        shape = (out_features, in_features // GROUP)
        return shape[::-1] if self.scales_transposed else shape

    def describe(self) -> str:
        """What is unlike SGLang's packing, in words."""
        parts = [
            ORIENTATIONS[self.orientation],
            "the nibbles are swapped: the odd input is in the low one" if self.swapped and not self.halves else "",
            "the low nibbles hold one half of the dimension and the high ones the other" if self.halves else "",
            OFFSET if self.offset else "",
            "the scales are transposed, [in/128, out]" if self.scales_transposed else "",
        ]
        return "; ".join(part for part in parts if part)

    def dequantize(self, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """int8 packed weight and its scales, stored in this way -> weights float32 [out, in]."""
        if self.orientation in (ALONG_OUTPUT, TRANSPOSED):
            packed = packed.T
        if self.offset:
            packed = packed ^ -120  # 0x88: q + 8 and two's complement differ in each nibble's highest bit
        low, high = (packed << 4) >> 4, packed >> 4
        pair = (high, low) if self.swapped else (low, high)
        q = torch.cat(pair, dim=-1) if self.halves else torch.stack(pair, dim=-1).flatten(-2)
        q_OI = q.T if self.orientation in (ALONG_OUTPUT, TRANSPOSED_ALONG_OUTPUT) else q
        scale_OG = (scale.T if self.scales_transposed else scale).float()
        return (q_OI.unflatten(-1, (-1, GROUP)).float() * scale_OG[..., None]).flatten(-2)


OFFSET = "the nibbles hold q + 8 (offset binary) instead of two's complement"
SGLANG = Packing()
HYPOTHESES = [
    Packing(*parts) for parts in product((False, True), (False, True), (False, True), ORIENTATIONS, (False, True))
]


def shapes_that_fit(shape: Shape, out_features: int, in_features: int) -> list[str]:
    """Descriptions of the wrong orientations that would give a packed weight this shape."""
    others = [Packing(orientation=orientation) for orientation in ORIENTATIONS if orientation != ALONG_INPUT]
    return [p.describe() for p in others if p.weight_shape(out_features, in_features) == shape]


def is_offset_binary(packed: torch.Tensor) -> bool:
    """Whether the nibbles of a packed weight, int8 of any shape, look like q + 8; needs no source.

    Weights are many near zero and few near the limits. Read as two's complement, q + 8 moves them to the limits: the
    outer values -8, -7, 6, 7 change places with -2, -1, 0, 1.
    """
    sample = packed[:: max(1, len(packed) // 64)]
    q = torch.stack(((sample << 4) >> 4, sample >> 4))
    outer = int(((q <= -7) | (q >= 6)).sum())
    inner = int(((q >= -2) & (q <= 1)).sum())
    return outer > 2 * inner


def relative_error(w_OI: torch.Tensor, restored_OI: torch.Tensor) -> float:
    """||w - w'||² / ||w||²; NaN where either is."""
    return float((w_OI - restored_OI).square().sum()) / max(float(w_OI.square().sum()), 1e-30)


class Recognizer:
    """Finds the packing that restores the source, the ones found before first."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._known: list[Packing] = []
        self._unexplained = 0

    def recognize(self, packed: torch.Tensor, scale: torch.Tensor, w_OI: torch.Tensor) -> Packing | None:
        """The way in which `packed` and `scale` were stored, if one of them restores w_OI to within the limit."""
        for packing in self._candidates():
            if (
                packing.weight_shape(*w_OI.shape) == tuple(packed.shape)
                and packing.scale_shape(*w_OI.shape) == tuple(scale.shape)
                and relative_error(w_OI, packing.dequantize(packed, scale)) <= self.limit
            ):
                if packing not in self._known:
                    self._known.append(packing)
                return packing
        self._unexplained += 1
        return None

    def _candidates(self) -> Iterator[Packing]:
        yield from list(self._known)
        if self._unexplained < PATIENCE:
            yield from (p for p in HYPOTHESES if p not in self._known)

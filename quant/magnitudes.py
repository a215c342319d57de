"""How large activations get, counted exactly, and the static FP8 input scale that follows.

SGLang quantizes the inputs of w1/w3 and of w2 with one scale a layer each. The largest activation sets a safe scale;
where a few outliers stretch it, a smaller one that clips them can cost less. Magnitudes are counted at bf16 precision,
32,768 counters in all, so that any scale can be judged afterwards on every activation that was seen.
"""

import math

import torch

from lightship.records import InputScale
from lightship.w4afp8 import FP8_MAX, LEAST_AMAX, round_through_fp8

BINS = 1 << 15
"""Non-negative bf16 numbers, by their bits."""
COUNTED = 1 << 22
"""Values that one call counts; more are counted by evenly spaced rows, for a GPU's counters are slow."""
PERCENTILES = (100.0, 99.9999, 99.999, 99.99, 99.9)
"""Candidates: the magnitude below which this share of the activations lies; 100 is the largest."""
OUTLIER_ERROR = 2 * (1 / 8) ** 2 / 12 / 2.25
"""A layer is flagged if its relative squared error is above twice e4m3's own: a step of 1/8 of a number's power of two,
uniform within it, over the mean square 2.25 of a mantissa between 1 and 2."""
BULK = 99.9
"""Percent of the activations, the smaller ones, whose own error counts for the flag too: outliers hold nearly all the
energy, so over everything the error looks small even where all others were rounded to zero."""


class Magnitudes:
    """Counts of absolute values, on the device of the tensors that are added."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.amax = 0.0
        self.finite = True

    def add(self, x: torch.Tensor) -> None:
        """Count `x` [rows, columns], floating point: all of it, or evenly spaced rows of a large one. The largest is
        always exact; a value that is not finite ends the counting.
        """
        if not x.numel():
            return
        magnitudes = x.abs()
        largest = float(magnitudes.max())
        self.finite = self.finite and math.isfinite(largest)
        if not self.finite:
            return
        self.amax = max(self.amax, largest)
        every = -(-magnitudes.numel() // COUNTED)
        bits = magnitudes[::every].bfloat16().flatten().view(torch.int16).to(torch.int32)
        self.counts += torch.bincount(bits, minlength=BINS)[:BINS]


def choose_input_scale(seen: Magnitudes) -> InputScale:
    """The candidate of least squared error over everything seen, each judged after it was rounded to bf16."""
    counts = seen.counts.cpu().double()
    values = torch.arange(BINS, dtype=torch.int16).view(torch.bfloat16).double()
    finite = values.isfinite()
    counts, values = counts[finite], values[finite]
    total = counts.sum()
    assert seen.finite
    assert total > 0
    cumulative = counts.cumsum(0)
    best: tuple[float, float, float] | None = None
    at_amax = 0.0
    for percentile in PERCENTILES:
        largest = seen.amax
        if percentile < 100:
            largest = float(values[int(torch.searchsorted(cumulative, total * percentile / 100))])
        scale = least_bf16_scale(largest)
        error = _error(counts, values, scale)
        if percentile == 100:
            at_amax = error
        if best is None or error < best[0]:
            best = (error, scale, percentile)
    assert best
    bulk = int(torch.searchsorted(cumulative, total * BULK / 100)) + 1
    return InputScale(
        scale=best[1],
        amax=seen.amax,
        percentile=best[2],
        error=best[0],
        error_at_amax=at_amax,
        outliers=max(best[0], _error(counts[:bulk], values[:bulk], best[1])) > OUTLIER_ERROR,
    )


def _error(counts: torch.Tensor, values: torch.Tensor, scale: float) -> float:
    """Squared error of rounding so many of each value to FP8, relative to their squares."""
    rounded = round_through_fp8(values.float(), scale).double()
    energy = (counts * values.square()).sum().clamp_min(1e-300)
    return float((counts * (values - rounded).square()).sum() / energy)


def least_bf16_scale(amax: float) -> float:
    """The least bf16 number that is not below amax / 448, so that nothing up to amax saturates; never 0."""
    scale = torch.tensor(max(amax, LEAST_AMAX) / FP8_MAX, dtype=torch.float64)
    rounded = scale.bfloat16()
    if rounded.double() < scale:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.bfloat16))
    return float(rounded)

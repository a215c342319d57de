"""How strict each look must be, so that several looks together are wrong no more often than one.

    python -c "from lightship.eval.boundaries import boundaries; print(boundaries((0.25, 0.5, 0.75, 1.0), 0.025))"

After each stage the statistic is compared with a boundary. The error that may be spent until a fraction t of the
questions is answered is Lan and DeMets' alpha*(t) = 2 - 2 Phi(z / sqrt(t)) with z = Phi^-1(1 - alpha / 2). It imitates
O'Brien and Fleming: hardly any of it early, so that the last look is almost as sharp as a single one.

Source: K. K. G. Lan and D. L. DeMets, Discrete sequential boundaries for clinical trials, Biometrika 70 (1983) 659-663.
"""

import math
from functools import cache
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()
NODES = 160
"""Of Gauss and Legendre's rule; the boundaries are then right to 1e-6."""
FARTHEST = 8.0
"""Standard deviations: where the density ends, and a boundary that nothing reaches."""


@cache
def boundaries(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """The one-sided boundary at each look, in standard deviations.

    Args:
        fractions: of the planned questions that are answered at each look, increasing, at most 1.
        alpha: probability, over all looks up to 1, that a statistic without drift reaches a boundary.
    """
    assert all(a < b <= 1 for a, b in zip((0.0, *fractions[:-1]), fractions, strict=True)), fractions
    found: list[float] = []
    points, mass, before, spent = np.zeros(1), np.ones(1), 0.0, 0.0
    for fraction in fractions:
        step = math.sqrt(fraction - before)
        target = spending(fraction, alpha) - spent
        low, high = 0.0, FARTHEST * math.sqrt(fraction)
        for _ in range(60):
            middle = (low + high) / 2
            if float(mass @ _above(middle - points, step)) > target:
                low = middle
            else:
                high = middle
        found.append(high / math.sqrt(fraction))
        points, mass = _go_on(points, mass, step, -FARTHEST * math.sqrt(fraction), high)
        before, spent = fraction, spent + target
    return tuple(found)


def spending(fraction: float, alpha: float) -> float:
    """The error that may be spent until this fraction of the questions is answered."""
    return 2 * NORMAL.cdf(NORMAL.inv_cdf(alpha / 2) / math.sqrt(fraction))


def _above(distance: np.ndarray, deviation: float) -> np.ndarray:
    """The probability that a normal step of this deviation is longer than each distance."""
    return np.array([0.5 * math.erfc(x / deviation / math.sqrt(2)) for x in distance])


def _go_on(
    points: np.ndarray, mass: np.ndarray, step: float, lowest: float, highest: float
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted points that stand for the paths below the boundary, one look later."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    later = (highest - lowest) / 2 * nodes + (highest + lowest) / 2
    density = np.exp(-(((later[:, None] - points[None, :]) / step) ** 2) / 2) / (step * math.sqrt(2 * math.pi)) @ mass
    return later, density * weights * (highest - lowest) / 2

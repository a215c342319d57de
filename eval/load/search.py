"""The largest load that is still sustained, found by doubling and then by bisection; a pure function of its answers.

search = Search(start=1.0)
while (load := search.next_load()) is not None:
    search.note(load, sustained=measure(load))
search.highest, search.refused
"""

import math
from dataclasses import dataclass, field

PRECISION = 1.1
"""Bisection ends when the refused load is at most this many times the sustained one."""
MOST_DOUBLINGS = 16
"""From the start, up or down, before the search gives up."""


@dataclass
class Search:
    """Doubles from `start` until a load is refused, or halves until one is sustained, and then closes in.

    It assumes that a server which sustains a load sustains every smaller one.
    """

    start: float
    most: float = math.inf
    """No load above this is tried."""
    whole: bool = False
    """Loads are whole numbers: requests in flight."""
    precision: float = PRECISION
    highest: float = 0.0
    """The largest load that was sustained."""
    refused: float = math.inf
    """The smallest that was not."""
    tried: list[float] = field(default_factory=list)

    def note(self, load: float, sustained: bool) -> None:
        """Take an answer."""
        self.tried.append(load)
        if sustained:
            self.highest = max(self.highest, load)
        else:
            self.refused = min(self.refused, load)

    def next_load(self) -> float | None:
        """The next load to try; None when the answer is known well enough, or will not be found."""
        load = self._next()
        return None if load is None or load in self.tried or load <= self.highest or load >= self.refused else load

    def _next(self) -> float | None:
        if not self.tried:
            return self._rounded(min(self.start, self.most))
        if not self.highest:
            smaller = self.refused / 2
            return self._rounded(smaller) if smaller >= self.start / 2**MOST_DOUBLINGS else None
        if math.isinf(self.refused):
            larger = min(2 * self.highest, self.most)
            return self._rounded(larger) if larger <= self.start * 2**MOST_DOUBLINGS else None
        if self.refused <= self.highest * self.precision:
            return None
        # Halfway in proportion: loads differ by factors.
        return self._rounded(math.sqrt(self.highest * self.refused))

    def _rounded(self, load: float) -> float:
        # The mean of two neighbours must not become one of them, unless there is none between.
        return float(max(1, round(load))) if self.whole else float(f"{load:.3g}")

"""What one check of a checkpoint finds: each fault and each warning in words, counted, the first of them kept."""

from lightship.records import Check

NAMED = 3
"""Findings that a check's `detail` names; it counts the others."""
KEPT = 100
"""Findings that the record keeps: a fault of every expert of a large model is 44,544 lines of the same."""


class Findings:
    """The findings of one check while it is under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.faults = 0
        self.warnings = 0
        self._faults: list[str] = []
        self._warnings: list[str] = []

    def fail(self, text: str) -> None:
        """Something that the loader refuses, or serves as nonsense."""
        self.faults += 1
        if len(self._faults) < KEPT:
            self._faults.append(text)

    def warn(self, text: str) -> None:
        """Something that is served, but that a person should know of."""
        self.warnings += 1
        if len(self._warnings) < KEPT:
            self._warnings.append(text)

    def check(self, fine: str) -> Check:
        """The answer; its detail is `fine` where nothing was found."""
        kept = (self._faults + self._warnings)[:KEPT]
        found = self.faults + self.warnings
        more = f" and {found - NAMED:,} more" if found > NAMED else ""
        return Check(
            name=self.name,
            passed=not self.faults,
            warned=bool(self.warnings),
            detail="; ".join(kept[:NAMED]) + more if kept else fine,
            findings=kept,
            found=found,
        )

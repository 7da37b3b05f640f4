"""How long a condition has held: what alerts and the learning verdict count learner steps with."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Streak:
    """Steps in a row in which a condition was as it is now. A step that does not tell it is not added, changes nothing.

    Example: trouble at steps 7 and 8, nothing told at 9, trouble at 10: `length` is 3 and `first_step` is 7.
    """

    length: int = 0
    """Steps in a row of trouble; negative: of calm."""
    first_step: int = 0
    """Step at which the newest trouble began."""

    def add(self, trouble: bool, step: int) -> int:
        """Count one more step; returns `length`."""
        if not trouble:
            self.length = min(self.length, 0) - 1
            return self.length
        if self.length <= 0:
            self.first_step = step
        self.length = max(self.length, 0) + 1
        return self.length

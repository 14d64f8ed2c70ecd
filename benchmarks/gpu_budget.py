"""Seconds for several parts of a measurement, and what they did not suffice for, by name."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a measurement.

    Args:
        name: In the record.
        share_s: Seconds that earlier parts leave to it. What it leaves goes to the next ones.
        run: Measures, and asks ``Budget.allows`` before each item.
    """

    name: str
    share_s: float
    run: Callable[[], None]


class Budget:
    """Seconds for everything, of which each part may use what the later ones do not need.

    Args:
        total_s: From now on.
        clock: Seconds; any clock that a test gives.
    """

    def __init__(self, total_s: float, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._total_s = clock, total_s
        self._started = clock()
        self._later_s = 0.0
        self._part = ""
        self.left_out: dict[str, list[str]] = {}
        self.errors: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}

    @property
    def spent_s(self) -> float:
        """Since the beginning."""
        return self._clock() - self._started

    @property
    def left_s(self) -> float:
        """For the part that runs."""
        return self._total_s - self._later_s - self.spent_s

    def allows(self, what: str, needed_s: float = 0.0) -> bool:
        """Whether an item has its time; if not, it is named among what was left out."""
        if self.left_s > needed_s:
            return True
        self.leave_out(what)
        return False

    def leave_out(self, what: str) -> None:
        """Name an item of this part that was not measured."""
        self.left_out.setdefault(self._part, []).append(what)

    def attempt(self, what: str, run: Callable[[], object], needed_s: float = 0.0) -> None:
        """Run an item if it has its time; an error is noted, for the others are worth theirs."""
        if not self.allows(what, needed_s):
            return
        try:
            run()
        except Exception as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {error}"[:600]
            self.errors.append({"part": self._part, "what": what, "error": said})

    def run(self, parts: Sequence[Part], after_each: Callable[[str], None]) -> None:
        """Run the parts one after the other; ``after_each`` may keep what there is so far."""
        for place, part in enumerate(parts):
            before = self.spent_s
            self._part = part.name
            self._later_s = sum(later.share_s for later in parts[place + 1 :])
            self.attempt("all of it", part.run)
            self.seconds[part.name] = round(self.spent_s - before, 1)
            after_each(part.name)

"""When a status that has changed is written: at once, unless much is being told and more of this one is about to be seen.

Only what no event tells of, and a job's beginning, may wait: what waits is then told together with what comes next, and nothing that
somebody should hear of is lost if it passes in the meantime.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

RUSH_COUNT, RUSH_SECONDS = 10, 2.0
"""So many of a kind within so many seconds are a rush."""
LATEST, STEP = 20.0, 5.0
"""Seconds that a transition may wait for the next one of its job while transitions rush in, and how often it asks whether they do."""
ENDING = 5.0
"""Seconds that a Job has to say that it is over after its last pod ended, before the status tells of pods that are not ready."""

SHARE, LONGEST_PAUSE = 20, 10.0
"""What is dear has its turn after so many times what the last turn took, and after so many seconds at the latest."""
LONGEST_WAIT = 120.0
"""Seconds that anybody may wait for a turn, however many want one."""


class Rush:
    """Whether something comes one upon another, or did until a moment ago. Times are in seconds; only differences matter."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=RUSH_COUNT)

    def note(self, now: float) -> None:
        """It came once more."""
        self._times.append(now)

    def on(self, now: float) -> bool:
        """Whether the last `RUSH_COUNT` came within `RUSH_SECONDS`."""
        return len(self._times) == RUSH_COUNT and now - self._times[0] <= RUSH_SECONDS


@dataclass
class Untold:
    """What one job's status does not say yet; times of the event loop."""

    begun: float | None = None
    """When the first status was put off before anything was seen of the job but that it is new."""
    news: float | None = None
    """When the transition that is not written was first seen."""
    ending: float | None = None
    """When all pods were first seen to be over while the Job was not."""
    progress_written: float = float("-inf")
    """When the progress that was written last was heard."""


class Pace:
    """One a process: it knows whether transitions rush in."""

    def __init__(self, progress_seconds: float):
        self._progress_seconds = progress_seconds
        self._news = Rush()

    def figures(self, untold: Untold, now: float, patience: float = 0.0) -> float:
        """Seconds until a status in which only figures changed may be written; in a rush they may be so much later than a period."""
        untold.news, untold.ending = None, None
        due = untold.progress_written + self._progress_seconds
        if now < due or not self._news.on(now):
            return due - now
        return min(STEP, due + patience - now)

    def transition(self, untold: Untold, *, pods_over: bool, now: float) -> float:
        """Seconds until a status in which more than figures changed may be written, of a job that goes on as it is."""
        if untold.news is None:
            untold.news = now if untold.begun is None else untold.begun
            self._news.note(now)
        wait = max(0.0, min(STEP, untold.news + LATEST - now)) if self._news.on(now) else 0.0
        if not pods_over:
            untold.ending = None
            return wait
        untold.ending = now if untold.ending is None else untold.ending
        return max(wait, untold.ending + ENDING - now)

    @staticmethod
    def written(untold: Untold, heard: float) -> None:
        """All that was to be told is told, with figures that were heard at that moment."""
        untold.begun, untold.news, untold.ending, untold.progress_written = None, None, None, heard


class Turns:
    """Turns for something dear, which may take one part in `SHARE` of the time: of many who want one, each gets a later one."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._free = float("-inf")
        self._waiting: set[Hashable] = set()

    def __contains__(self, who: Hashable) -> bool:
        """Whether it has a turn that it has not had yet."""
        return who in self._waiting

    def book(self, who: Hashable, now: float) -> float:
        """The moment of a turn, behind those of all who wait; if they are too many for that, somewhere between them."""
        offset = max(0.0, self._free - now) + len(self._waiting) * self._pause
        self._waiting.add(who)
        return now + offset % LONGEST_WAIT

    def leave(self, who: Hashable) -> None:
        """It has had its turn, or wants none any more."""
        self._waiting.discard(who)

    def took(self, begun: float, now: float) -> None:
        """How long a turn lasted."""
        self._pause = min(SHARE * (now - begun), LONGEST_PAUSE)
        self._free = now + self._pause

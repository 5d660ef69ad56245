"""A mistake in the user's input, and the exception for all mistakes of one command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One mistake in the user's files or options: where it is, the key as written, the problem, and how to correct it.

    `feature`: the name of the feature if the input asks for a feature that a FineTuneJob does not have, otherwise empty.
    """

    location: str
    key: str
    message: str
    hint: str = ""
    feature: str = ""

    def __str__(self) -> str:
        prefix = ": ".join(dict.fromkeys(part for part in (self.location, self.key) if part))
        return f"{prefix}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class InvalidInput(Exception):
    """The input cannot be used. `mistakes` holds every mistake, so that the user can correct all of them at once."""

    def __init__(self, mistakes: list[Mistake]):
        super().__init__(f"{len(mistakes)} mistakes")
        self.mistakes = mistakes

"""kopf's two stores, holding nothing: we keep no state of kopf's on any object, so nothing is to be computed for it either.

By default kopf copies every object deeply for every event, to tell what a user changed since; with run configurations of several
kilobytes inside Jobs that is most of what an event costs, for an answer that nobody asks for.
"""

from __future__ import annotations

from typing import Any

import kopf


class NoDiffBase(kopf.DiffBaseStorage):
    """Remembers no last-handled state."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """Nothing of an object is compared."""
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        """Nothing was remembered."""
        return None

    def store(self, **_: Any) -> None:
        """Remember nothing."""


class NoProgress(kopf.ProgressStorage):
    """Remembers no progress of handlers: there are none that are repeated."""

    def fetch(self, **_: Any) -> None:
        """Nothing was remembered."""

    def store(self, **_: Any) -> None:
        """Remember nothing."""

    def purge(self, **_: Any) -> None:
        """Nothing is to be forgotten."""

    def touch(self, **_: Any) -> None:
        """No object is ever touched."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """Nothing of ours is in it."""
        return essence

"""The marker `_USED` in each folder below `<storage.uri>/<namespace>/_prepared/`, which says until when the prepared rows are kept.

Each preparation that uses the rows sets a later time in the marker, and so does the first pod of each attempt that uses the rows. After this
time, preparation pods and `finetune purge` may remove the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime

from finetune_api.base import LenientModel
from finetune_api.names import USED_MARKER, Storage


class UsedMarker(LenientModel):
    """The content of the object `_USED`."""

    until: AwareDatetime
    """Before this time, the rows are not removed."""

    @staticmethod
    def parse(marker_json: bytes | None) -> UsedMarker | None:
        """Return the marker, or None if it is missing or cannot be read."""
        try:
            return UsedMarker.model_validate_json(marker_json) if marker_json is not None else None
        except ValueError:
            return None

    def to_bytes(self) -> bytes:
        """Return the content of the object `_USED`."""
        return self.model_dump_json(by_alias=True).encode()

    def is_expired(self, now: datetime) -> bool:
        """Whether the rows may be removed."""
        return now >= self.until


def renew_marker(current_marker: UsedMarker | None, now: datetime, ttl_days: int) -> UsedMarker:
    """Return a marker that keeps the rows for `ttl_days`, and at least as long as the current marker does."""
    kept_until = now.astimezone(UTC).replace(microsecond=0) + timedelta(days=ttl_days)
    return UsedMarker(until=kept_until if current_marker is None else max(kept_until, current_marker.until))


def group_keys_for_removal(object_keys: Iterable[str]) -> list[list[str]]:
    """Return groups of the keys in a folder with prepared rows, in the order of removal: commit marker, manifests, other files, `_USED`.

    With this order, a reader finds either the complete rows or no commit marker. An interrupted removal leaves `_USED`, so a later removal
    can continue.
    """
    group_number_by_name = {Storage.COMMITTED.value: 0, Storage.MANIFEST.value: 1, USED_MARKER: 3}
    keys_by_group_number: dict[int, list[str]] = {}
    for key in sorted(object_keys):
        keys_by_group_number.setdefault(group_number_by_name.get(key.rpartition("/")[2], 2), []).append(key)
    return [keys_by_group_number[group_number] for group_number in sorted(keys_by_group_number)]

"""Finds the prepared rows of a namespace that no job has used for `prepare.ttlDays`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.names import USED_MARKER, prepared_root
from finetune_api.prepared import UsedMarker, removal_order

from finetune_cli.job_storage import JobStorage, StoredObject


@dataclass(frozen=True)
class UnusedRows:
    """Prepared rows that may be removed. `objects` are in the order of their removal."""

    storage: JobStorage
    objects: list[StoredObject]

    @property
    def bytes(self) -> int:
        """Size of all objects."""
        return sum(stored.size for stored in self.objects)

    def delete(self) -> None:
        """Delete the objects. Raises StorageError."""
        self.storage.delete_objects(self.objects)


def find_unused_rows(job_storage: JobStorage, now: datetime) -> UnusedRows:
    """Return the unused rows of the namespace of a job. Raises StorageError.

    Rows without a readable marker `_USED` are kept: the next preparation pod writes the marker.
    """
    storage = job_storage.open_folder(prepared_root(job_storage.uri))
    by_digest: dict[str, dict[str, StoredObject]] = {}
    for stored in storage.list_objects():
        by_digest.setdefault(stored.key.partition("/")[0], {})[stored.key] = stored
    unused = []
    for digest, objects in by_digest.items():
        marker = UsedMarker.parse(storage.read_if_exists(f"{digest}/{USED_MARKER}"))
        if marker is not None and marker.is_expired(now):
            unused += [objects[key] for group in removal_order(objects) for key in group]
    return UnusedRows(storage, unused)

"""Finds and deletes a namespace's prepared rows that no job has used for `prepare.ttlDays` days."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.names import USED_MARKER, make_prepared_rows_uri
from finetune_api.prepared import UsedMarker, group_keys_for_removal

from finetune_cli.job_storage import JobStorage, StoredObject


@dataclass(frozen=True)
class UnusedRows:
    """Prepared rows that no job has used for `prepare.ttlDays` days."""

    storage: JobStorage
    groups_by_digest: dict[str, list[list[StoredObject]]]
    """For each digest of prepared rows: groups of objects, in the order in which the groups must be deleted. The first group is the commit marker."""

    @property
    def objects(self) -> list[StoredObject]:
        """All objects of the unused rows."""
        return [stored_object for groups in self.groups_by_digest.values() for group in groups for stored_object in group]

    @property
    def bytes(self) -> int:
        """Size of all objects in bytes."""
        return sum(stored_object.size for stored_object in self.objects)

    def delete(self, now: datetime) -> UnusedRows:
        """Delete the rows that are still unused, and return the deleted rows. If a job has used rows since they were found, these rows are kept.

        Raises StorageError.

        Each group is deleted with its own request, because a store may delete the objects of one request in any order.
        """
        deleted_groups_by_digest = {}
        for digest, groups in self.groups_by_digest.items():
            if not _is_unused(self.storage, digest, now):
                continue
            for group in groups:
                self.storage.delete_objects(group)
            deleted_groups_by_digest[digest] = groups
        return UnusedRows(self.storage, deleted_groups_by_digest)


def find_unused_rows(job_storage: JobStorage, now: datetime) -> UnusedRows:
    """Return the unused rows in the namespace of a job. Raises StorageError.

    If rows have no readable marker `_USED`, they are not returned, because the next preparation pod writes this marker.
    """
    storage = job_storage.open_folder(make_prepared_rows_uri(job_storage.uri))
    objects_by_digest: dict[str, dict[str, StoredObject]] = {}
    for stored_object in storage.list_objects():
        objects_by_digest.setdefault(stored_object.key.partition("/")[0], {})[stored_object.key] = stored_object
    unused_groups_by_digest = {
        digest: [[objects[key] for key in group] for group in group_keys_for_removal(objects)]
        for digest, objects in objects_by_digest.items()
        if _is_unused(storage, digest, now)
    }
    return UnusedRows(storage, unused_groups_by_digest)


def _is_unused(storage: JobStorage, digest: str, now: datetime) -> bool:
    marker = UsedMarker.parse(storage.read_if_exists(f"{digest}/{USED_MARKER}"))
    return marker is not None and marker.is_expired(now)

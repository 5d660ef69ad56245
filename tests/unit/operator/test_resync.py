"""Full lists of all objects: how they remove deleted objects from the cache, lists that must be restarted, and API servers that were restored from a backup."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from finetune_operator.cache import JobCache
from finetune_operator.kube import KubeClient, NotFound, ObjectList
from finetune_operator.objects import FINETUNEJOB, Kind, Object
from finetune_operator.resync import Resyncer
from finetune_operator.settings import StartError
from finetune_operator.workqueue import JobKey, WorkQueue

from tests.unit.operator.virtual import run


class ListServer:
    """An API server whose list of FineTuneJobs consists of the given pages. Its lists of other kinds are empty and have the same resourceVersion."""

    def __init__(self, *pages: ObjectList) -> None:
        self.pages_of_finetunejobs = pages

    async def list_pages(self, kind: Kind, namespace: str | None, *, label_selector: str = "") -> AsyncIterator[ObjectList]:
        for page in (
            self.pages_of_finetunejobs if kind is FINETUNEJOB else [ObjectList([], self.pages_of_finetunejobs[-1].version)]
        ):
            yield page


class MissingCrd:
    """An API server on which the CRD is not installed."""

    async def list_pages(self, kind: Kind, namespace: str | None, *, label_selector: str = "") -> AsyncIterator[ObjectList]:
        raise NotFound("list", kind, "", 404, "NotFound", "the server could not find the requested resource")
        yield ObjectList([], 0)


def make_body(name: str, version: int) -> Object:
    meta = {"namespace": "team", "name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": meta, "spec": {}}


def make_resyncer(server: Any, cache: JobCache) -> Resyncer:
    return Resyncer(cast(KubeClient, server), cache, WorkQueue(), ())


def test_objects_that_are_missing_in_a_full_list_leave_the_cache() -> None:
    async def scenario() -> list[JobKey]:
        cache = JobCache()
        server = ListServer(ObjectList([make_body("a", 3), make_body("b", 4)], 5))
        resync = make_resyncer(server, cache)
        await resync.run_once()
        server.pages_of_finetunejobs = (ObjectList([make_body("b", 4)], 9),)
        await resync.run_once()
        return cache.list_keys()

    assert run(scenario()) == [JobKey("team", "b")]


def test_pages_before_the_restart_of_a_list_do_not_count_as_listed() -> None:
    async def scenario() -> list[JobKey]:
        cache = JobCache()
        server = ListServer(ObjectList([make_body("a", 3), make_body("b", 4)], 5))
        resync = make_resyncer(server, cache)
        await resync.run_once()
        server.pages_of_finetunejobs = (ObjectList([make_body("a", 3)], 6), ObjectList([make_body("b", 4)], 9, is_first_page=True))
        await resync.run_once()
        return cache.list_keys()

    assert run(scenario()) == [JobKey("team", "b")]


def test_all_pages_of_a_list_count_as_listed() -> None:
    async def scenario() -> list[JobKey]:
        cache = JobCache()
        server = ListServer(ObjectList([make_body("a", 3)], 5), ObjectList([make_body("b", 4)], 5, is_first_page=False))
        resync = make_resyncer(server, cache)
        await resync.run_once()
        await resync.run_once()
        return cache.list_keys()

    assert run(scenario()) == [JobKey("team", "a"), JobKey("team", "b")]


def test_server_that_was_restored_from_a_backup_ends_the_process() -> None:

    """After a restore, the resourceVersions of new events are lower than the cached resourceVersions, so the cache would ignore these events.

    So the operator process ends, and the restarted process begins with an empty cache.
    """

    async def scenario() -> None:
        server = ListServer(ObjectList([], 20))
        resync = make_resyncer(server, JobCache())
        for version in (20, 30):
            server.pages_of_finetunejobs = (ObjectList([], version),)
            await resync.run_once()
        server.pages_of_finetunejobs = (ObjectList([], 12),)
        with pytest.raises(StartError, match="decreased from 30 to 12"):
            await resync.run_once()

    run(scenario())


def test_missing_crd_is_a_start_error() -> None:
    async def scenario() -> None:
        with pytest.raises(StartError, match="install the CRD first"):
            await make_resyncer(MissingCrd(), JobCache()).run_once()

    run(scenario())


def test_first_full_list_sets_cache_filled() -> None:
    async def scenario() -> list[bool]:
        resync = make_resyncer(ListServer(ObjectList([], 20)), JobCache())
        was_filled_before = resync.cache_filled.is_set()
        await resync.run_once()
        return [was_filled_before, resync.cache_filled.is_set()]

    assert run(scenario()) == [False, True]

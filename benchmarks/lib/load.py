"""Create Kubernetes objects with many concurrent clients, and record with watches when objects are first seen."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

from localcluster import Endpoint

Object = dict[str, Any]
METADATA_ONLY_MEDIA_TYPE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"


class Client:
    """A client of the API server, to be used as an async context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __aenter__(self) -> Client:
        ssl_context = ssl.create_default_context(cafile=str(self._endpoint.ca))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=ssl_context, limit=0),
            headers={"Authorization": f"Bearer {self._endpoint.token}"}, timeout=aiohttp.ClientTimeout(total=None),
        )  # fmt: skip
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._session.close()

    async def send(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Object:
        """Send one request and return the JSON of the response. Errors: RuntimeError with the server's message."""
        request_body = None if body is None else json.dumps(body).encode()
        url = self._endpoint.server + path
        async with self._session.request(method, url, data=request_body, headers={"Content-Type": content_type}) as response:
            response_body = await response.read()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path}: {response.status} {response_body[:300].decode(errors='replace')}")
            response_object: Object = json.loads(response_body)
            return response_object

    async def list(self, path: str) -> list[Object]:
        """Read all objects of a collection, page by page."""
        items: list[Object] = []
        continue_token = ""
        while True:
            page = await self.send("GET", f"{path}?limit=500" + (f"&continue={continue_token}" if continue_token else ""))
            items += page["items"]
            continue_token = page["metadata"].get("continue", "")
            if not continue_token:
                return items

    async def create_all(self, path: str, bodies: list[Object], client_count: int) -> dict[str, float]:
        """Create all objects with `client_count` concurrent clients. Returns the times at which the requests were sent, by name."""
        sent_at_by_name: dict[str, float] = {}
        remaining_bodies = iter(bodies)

        async def create_remaining_objects() -> None:
            for body in remaining_bodies:
                sent_at_by_name[body["metadata"]["name"]] = time.monotonic()
                await self.send("POST", path, body)

        async with asyncio.TaskGroup() as group:
            for _ in range(client_count):
                group.create_task(create_remaining_objects())
        return sent_at_by_name

    async def watch_events(self, path: str, *, resource_version: str, is_metadata_only: bool) -> AsyncIterator[Object]:
        """Yield the events of a watch from a resourceVersion on. If `is_metadata_only` is true, the objects have only their metadata."""
        headers = {"Accept": METADATA_ONLY_MEDIA_TYPE} if is_metadata_only else {}
        url = f"{self._endpoint.server}{path}?watch=true&resourceVersion={resource_version}"
        incomplete_line = b""
        async with self._session.get(url, headers=headers) as stream:
            if stream.status >= 400:
                raise RuntimeError(f"watch {path}: {stream.status} {await stream.text()}")
            async for chunk in stream.content.iter_any():
                *lines, incomplete_line = (incomplete_line + chunk).split(b"\n")
                for line in lines:
                    yield json.loads(line)


class FirstSeenWatch:
    """Watches a collection, and stores for each object the time at which `is_wanted` was first true.

    If `is_wanted` is None, the first event of an object counts.
    """

    def __init__(self, client: Client, path: str, is_wanted: Callable[[Object], bool] | None = None) -> None:
        self._client, self._path, self._is_wanted = client, path, is_wanted
        self.first_seen_at: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> FirstSeenWatch:
        resource_version = (await self._client.send("GET", f"{self._path}?limit=1"))["metadata"]["resourceVersion"]
        self._task = asyncio.create_task(self._watch(resource_version))
        return self

    async def __aexit__(self, *raised: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self, resource_version: str) -> None:
        try:
            await self._record_first_seen(resource_version)
        finally:
            self._changed.set()

    async def _record_first_seen(self, resource_version: str) -> None:
        """Watch until cancelled. If the server ends a slow watch, start a new watch from the last resourceVersion."""
        while True:
            async for event in self._client.watch_events(self._path, resource_version=resource_version, is_metadata_only=self._is_wanted is None):
                if event["type"] == "ERROR":
                    raise RuntimeError(f"watch {self._path}: {event['object'].get('message')}")
                resource_version = event["object"]["metadata"]["resourceVersion"]
                self._record(event)

    def _record(self, event: Object) -> None:
        body, name = event["object"], event["object"]["metadata"].get("name", "")
        if event["type"] not in ("ADDED", "MODIFIED") or name in self.first_seen_at:
            return
        if self._is_wanted is None or self._is_wanted(body):
            self.first_seen_at[name] = time.monotonic()
            self._changed.set()

    async def wait_for_count(self, count: int, timeout_seconds: float) -> float:
        """Wait until `count` objects have been seen. Returns the time at which the last of them was first seen.

        Errors: TimeoutError after `timeout_seconds`.
        """
        deadline = time.monotonic() + timeout_seconds
        while len(self.first_seen_at) < count:
            if self._task is None or self._task.done():
                raise RuntimeError(f"the watch of {self._path} ended") from (self._task and self._task.exception())
            self._changed.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                seen_count = len(self.first_seen_at)
                raise TimeoutError(f"{seen_count} of {count} seen at {self._path} in {timeout_seconds:.0f} s") from None
        return sorted(self.first_seen_at.values())[count - 1]


def make_condition_test(condition_type: str) -> Callable[[Object], bool]:
    """Return a function that says whether an object has the condition `condition_type` with status True."""

    def is_condition_true(body: Object) -> bool:
        conditions = (body.get("status") or {}).get("conditions") or []
        return any(condition["type"] == condition_type and condition["status"] == "True" for condition in conditions)

    return is_condition_true


def compute_percentile(values: list[float], fraction: float) -> float:
    """Return a percentile of the values; 0 if there are none. `fraction`: for example 0.99."""
    sorted_values = sorted(values)
    return sorted_values[min(len(sorted_values) - 1, int(fraction * len(sorted_values)))] if sorted_values else 0.0

"""Servers of this machine that pods of the cluster reach: they listen in the network of the first node and have a Service."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from tests.e2e.jobs.installation import JobNamespace

CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Run a block of this thread in the network of another process. A socket that is opened in the block stays in that network."""
    libc = ctypes.CDLL(None, use_errno=True)
    own, other = (os.open(f"/proc/{name}/ns/net", os.O_RDONLY) for name in ("thread-self", pid))

    def enter(namespace: int) -> None:
        if libc.setns(namespace, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    try:
        enter(other)
        try:
            yield
        finally:
            enter(own)
    finally:
        os.close(own)
        os.close(other)


def create_service(job_namespace: JobNamespace, name: str, port: int, target_port: int) -> None:
    """Create a Service for a port of the first node."""
    cluster = job_namespace.installation.cluster
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"name": "http", "port": port}]}}
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
        "endpoints": [{"addresses": [cluster.plan.nodes[0].address]}], "ports": [{"name": "http", "port": target_port}],
    }  # fmt: skip
    job_namespace.apply(service, endpoints)

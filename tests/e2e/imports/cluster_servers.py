"""Let pods of the cluster reach servers of the test process: the servers listen in the network namespace of the first node and have a Service."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from tests.e2e.jobs.installation import JobNamespace

CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def enter_network(pid: int) -> Iterator[None]:
    """Run a `with` block of this thread in the network namespace of another process. Sockets that are opened in the block stay in that namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    own_namespace, other_namespace = (os.open(f"/proc/{name}/ns/net", os.O_RDONLY) for name in ("thread-self", pid))

    def set_namespace(namespace: int) -> None:
        if libc.setns(namespace, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    try:
        set_namespace(other_namespace)
        try:
            yield
        finally:
            set_namespace(own_namespace)
    finally:
        os.close(own_namespace)
        os.close(other_namespace)


def create_service(job_namespace: JobNamespace, name: str, port: int, target_port: int) -> None:
    """Create a Service whose port `port` leads to `target_port` of the first node."""
    cluster = job_namespace.installation.cluster
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"name": "http", "port": port}]}}
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
        "endpoints": [{"addresses": [cluster.plan.nodes[0].address]}], "ports": [{"name": "http", "port": target_port}],
    }  # fmt: skip
    job_namespace.apply(service, endpoints)

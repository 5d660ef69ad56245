"""The TCPStore of an agent listens only on the loopback interface."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


def list_listening_addresses(port: int) -> list[str]:
    """Return the addresses on which sockets of this machine listen on the port, in the hexadecimal form of /proc/net/tcp and tcp6."""
    lines = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return [fields[1].partition(":")[0] for fields in lines if fields[3] == "0A" and int(fields[1].partition(":")[2], 16) == port]


def test_the_store_listens_only_on_the_loopback_interface() -> None:
    from finetune_trainer.rendezvous import register_loopback_rendezvous
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

    listener = socket.create_server(("127.0.0.1", 0))
    port = int(listener.getsockname()[1])
    backend = register_loopback_rendezvous(listener)
    parameters = RendezvousParameters(backend, f"127.0.0.1:{port}", "run", 1, 1, rank=0, timeout=20)
    rendezvous_info = rendezvous_handler_registry.create_handler(parameters).next_rendezvous()
    store_info = rendezvous_info.bootstrap_store_info
    assert (rendezvous_info.rank, rendezvous_info.world_size, store_info.master_addr, store_info.master_port) == (0, 1, "127.0.0.1", port)
    assert list_listening_addresses(port) == ["0100007F"]
    rendezvous_info.store.set("key", "value")
    client = TCPStore("127.0.0.1", port, None, False)
    assert client.get("run/key") == b"value"

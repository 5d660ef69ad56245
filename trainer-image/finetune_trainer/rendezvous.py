"""The rendezvous of the agents: torchelastic's static rendezvous, with a TCPStore that listens only on the loopback interface.

torch's own static rendezvous listens on all interfaces, and accepts every connection.
"""

from __future__ import annotations

import socket

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous, create_rdzv_handler

RENDEZVOUS_BACKEND = "finetune-loopback"


class LoopbackRendezvous(StaticTCPRendezvous):
    """Static rendezvous in which the agent of node rank 0 creates the TCPStore on `listener`, a bound socket."""

    def __init__(self, handler: StaticTCPRendezvous, listener: socket.socket) -> None:
        super().__init__(
            handler.master_addr, handler.master_port, handler.rank, handler.world_size, handler.run_id, int(handler.timeout.total_seconds())
        )
        self._listener = listener

    def get_backend(self) -> str:
        """Return the name under which this rendezvous is registered."""
        return RENDEZVOUS_BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Create the store, then wait for the agents of all pods."""
        if self._store is None:
            # Only torch's store without libuv can use a socket that already exists.
            self._store = TCPStore(
                self.master_addr, self.master_port, self.world_size, True, self.timeout,
                master_listen_fd=self._listener.detach(), use_libuv=False,
            )  # fmt: skip
        return super().next_rendezvous()


def register_loopback_rendezvous(listener: socket.socket) -> str:
    """Register the rendezvous for this process, and return the name of its backend."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        handler = create_rdzv_handler(parameters)
        assert isinstance(handler, StaticTCPRendezvous)  # noqa: S101 -- torch's function returns no other class
        return LoopbackRendezvous(handler, listener)

    rendezvous_handler_registry.register(RENDEZVOUS_BACKEND, create)
    return RENDEZVOUS_BACKEND

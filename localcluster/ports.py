"""Find free ports on the loopback interface.

The ports are below the range of ephemeral ports. Otherwise the kernel could assign a port to an outgoing connection before the server binds
it. Two programs may still choose the same port: the caller must choose again if bind fails with `address already in use`.
"""

from __future__ import annotations

import contextlib
import random
import socket

FIRST_PORT, LAST_PORT = 20000, 32700


def find_free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return `count` different TCP ports that are now unused on `host`."""
    ports: list[int] = []
    with contextlib.ExitStack() as sockets:
        for port in random.SystemRandom().sample(range(FIRST_PORT, LAST_PORT), 2000):
            probe_socket = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                probe_socket.bind((host, port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise OSError(f"fewer than {count} of the ports {FIRST_PORT}-{LAST_PORT} are free on {host}")

"""Free ports on the loopback.

Taken from below the range that the kernel hands to outgoing connections, so that nothing of the machine's own grabs one
between our look and the server's bind. Two programs may still choose the same port at once: whoever starts a server
must treat `address already in use` as a reason to choose again.
"""

from __future__ import annotations

import contextlib
import random
import socket

FIRST, LAST = 20000, 32700


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """`count` different TCP ports that nobody listens on at `host` right now."""
    chosen: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.SystemRandom().sample(range(FIRST, LAST), 2000):
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                probe.bind((host, port))
            except OSError:
                continue
            chosen.append(port)
            if len(chosen) == count:
                return chosen
    raise OSError(f"fewer than {count} of the ports {FIRST}-{LAST} are free on {host}")

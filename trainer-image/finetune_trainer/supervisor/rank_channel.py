"""The supervisor's end of the channel to its ranks: a datagram socket that one thread reads."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.channel import MAX_MESSAGE_BYTES, read_spilled

log = logging.getLogger(__name__)
RECEIVE_BUFFER_BYTES = 4 * 1024 * 1024


class RankChannel:
    """Receives the messages of ranks in a thread, and calls `on_message` with each message in the order of arrival."""

    def __init__(self, on_message: Callable[[dict[str, Any]], None]) -> None:
        # The socket cannot be in the work folder, because the path of the work folder may be too long: a Unix socket allows 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="finetune-"))
        self.address = str(self._folder / "socket")
        self._on_message = on_message
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self._socket.bind(self.address)
        self._socket.settimeout(0.2)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive_messages, name="rank-channel", daemon=True)
        self._thread.start()

    def _receive_messages(self) -> None:
        while True:
            try:
                message_bytes = self._socket.recv(MAX_MESSAGE_BYTES + 1)
            except TimeoutError:
                if self._closing.is_set():
                    return
                continue
            except OSError:
                return
            message = self._parse_message(message_bytes)
            if message is not None:
                try:
                    self._on_message(message)
                except (
                    Exception
                ):  # An invalid message must not end the thread, because later messages must still be received.
                    log.exception("a rank's message could not be applied: %s", message.get("kind"))

    def _parse_message(self, message_bytes: bytes) -> dict[str, Any] | None:
        """Return the message, or None if the bytes are not a valid message."""
        try:
            message = json.loads(message_bytes)
            message = read_spilled(message, self._folder) if isinstance(message, dict) else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Receive the messages that were already sent, then stop. Call this after all ranks have ended."""
        self._closing.set()
        self._thread.join(timeout=30)
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

"""A headless Chromium with one page, controlled by the DevTools protocol on two pipes. With pipes, the tests need no WebSocket library and no open port.

Each message is one JSON object followed by a zero byte; see `--remote-debugging-pipe` in Chromium's
`content/public/common/content_switches.cc`. Chromium reads from file descriptor 3 and writes to file descriptor 4.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
PACKAGE = "chromium-headless-shell"
"""The Debian package to install. This package is much smaller than the package of the full browser."""
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip

CONNECT_PIPES = """
import fcntl, os, sys
to_browser, from_browser = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(to_browser, 3)
os.dup2(from_browser, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Program that moves the pipes to the file descriptors 3 and 4, which the browser expects, and then executes the browser."""


def find_browser() -> str | None:
    """Return the path of an installed Chromium program, or None."""
    return next((path for program in PROGRAMS if (path := shutil.which(program))), None)


@dataclass
class PageLoad:
    """The requests and errors of a page while it was loaded."""

    requests: list[str] = field(default_factory=list)
    """URLs that the page requested. The URL of the page itself is not included."""
    errors: list[str] = field(default_factory=list)
    """Console messages and exceptions of scripts."""


class Browser:
    """One browser process with one page. Use it in a `with` block."""

    def __init__(self, program: str) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # other processes of the browser may still use the folder
        to_browser, self._write_descriptor = os.pipe()
        self._read_descriptor, from_browser = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", CONNECT_PIPES, str(to_browser), str(from_browser), program, *ARGUMENTS, f"--user-data-dir={self._folder.name}"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._last_command_id = b"", 0
        self._events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    _session: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception_info: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write_descriptor)
        os.close(self._read_descriptor)
        self._folder.cleanup()

    def show(self, url: str, *, width: int, height: int = 800, dark: bool = False) -> PageLoad:
        """Load a page and wait until it is loaded. `width` and `height` are the window's size in CSS pixels."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self._events.clear()
        self._send("Page.navigate", url=url)
        self._wait_for(lambda event: event["method"] == "Page.loadEventFired")
        page_load = PageLoad()
        for event in self._events:
            self._record_event(event, url, page_load)
        return page_load

    @staticmethod
    def _record_event(event: dict[str, Any], url: str, page_load: PageLoad) -> None:
        parameters = event.get("params", {})
        match event["method"]:
            case "Network.requestWillBeSent" if parameters["request"]["url"] != url:
                page_load.requests.append(parameters["request"]["url"])
            case "Log.entryAdded":
                page_load.errors.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                page_load.errors.append(json.dumps(parameters))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self._send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """Save a picture of the page from its top down to `height` CSS pixels. The default is the whole page."""
        size = self._send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        encoded_image = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(encoded_image))

    # ---- the protocol

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result. Errors: RuntimeError with the browser's message."""
        self._last_command_id += 1
        command_id = self._last_command_id
        message: dict[str, Any] = {"id": command_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_descriptor, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != command_id:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def _wait_for(self, is_wanted: Callable[[dict[str, Any]], bool]) -> None:
        while not any(is_wanted(event) for event in self._events):
            self._events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        """Return the browser's next message. Errors: RuntimeError if the browser has exited."""
        while b"\0" not in self._buffer:
            data = os.read(self._read_descriptor, 1 << 16)
            if not data:
                raise RuntimeError(f"the browser exited with code {self._process.wait()}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

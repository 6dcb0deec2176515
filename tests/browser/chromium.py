"""Headless Chromium over its DevTools pipe: one page, and everything that it said or asked for meanwhile.

The pipe (`--remote-debugging-pipe`) needs no port and no library: messages are JSON, each ended by a zero byte, read
by the browser from descriptor 3 and written to descriptor 4.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT = 60.0


def find_chromium() -> str:
    """Path of the browser; its absence is a failure, never a skip."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    assert found, f"none of {', '.join(NAMES)} is on PATH: install Chromium (Debian: apt-get install chromium)"
    return found


class Browser:
    """A browser and one page of it.

    Attributes:
        requested: Address of every request that the page made.
        complaints: Console messages of any level, uncaught errors, and entries of the browser's log.
    """

    def __init__(self, profile: Path) -> None:
        ours, theirs = _pipe(), _pipe()
        self._write, self._read = ours[1], theirs[0]
        command = [find_chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = [(os.POSIX_SPAWN_OPEN, handle, os.devnull, os.O_WRONLY, 0) for handle in (1, 2)]
        moved = [(os.POSIX_SPAWN_DUP2, ours[0], 3), (os.POSIX_SPAWN_DUP2, theirs[1], 4)]
        self._pid = os.posix_spawn(command[0], command, os.environ, file_actions=[*quiet, *moved], setpgroup=0)
        os.close(ours[0])
        os.close(theirs[1])
        self._buffer, self._number = b"", 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; what comes meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found.get('error')}"
                return found["result"]
            self._events.append(found)

    def open(self, url: str, *, width: int, height: int, dark: bool, mobile: bool = False) -> None:
        """Load a page at a size and colour scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what is in view."""
        content = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(content["data"]))

    @property
    def requested(self) -> list[str]:
        """Addresses that the page asked for since it was opened."""
        return [event["params"]["request"]["url"] for event in self._of("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """What the page or the browser complained of since it was opened."""
        told = [str(event["params"].get("args")) for event in self._of("Runtime.consoleAPICalled")]
        told += [str(event["params"]["exceptionDetails"]) for event in self._of("Runtime.exceptionThrown")]
        return told + [str(event["params"]["entry"]) for event in self._of("Log.entryAdded")]

    def close(self) -> None:
        """End the browser and all that it started."""
        for handle in (self._write, self._read):
            os.close(handle)
        deadline = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
            time.sleep(0.05)

    def _of(self, method: str) -> list[dict[str, Any]]:
        return [event for event in self._events if event.get("method") == method]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                assert selector.select(deadline - time.monotonic()), "the browser does not answer"
                chunk = os.read(self._read, 1 << 16)
                assert chunk, "the browser ended"
                self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends have numbers above 9."""
    ends = []
    for low in os.pipe():
        ends.append(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(low)
    return ends[0], ends[1]


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser for the length of a block."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()

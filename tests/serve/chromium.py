"""Chromium driven over its own protocol, through a pair of pipes: what a test of a page needs, and no library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


class Page:
    """One tab. Use it in a ``with`` statement; what the page complains about is in ``complaints``."""

    def __init__(self, folder: Path) -> None:
        """``folder`` takes the profile and what is downloaded."""
        self.folder, self.downloads = folder, folder / "downloads"
        self.downloads.mkdir(parents=True)
        self.complaints: list[str] = []
        self._number, self._rest, self._session = 0, b"", ""

    def __enter__(self) -> Page:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def ends() -> None:  # the browser reads from 3 and writes to 4
            spare = os.dup(to_write), os.dup(to_read)
            os.dup2(spare[1], 3)
            os.dup2(spare[0], 4)

        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self.folder / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=ends, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.ask(f"{domain}.enable")
        self.ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = dict(id=self._number, method=method, params=parameters)
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while (answer := self._next(deadline)).get("id") != self._number:
            self._hear(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer.")
            new = os.read(self._from, 1 << 20)
            if not new:
                raise RuntimeError("Chromium has gone.")
            self._rest += new
        line, self._rest = self._rest.split(b"\0", 1)
        return json.loads(line)

    def _hear(self, event: dict[str, Any]) -> None:
        of = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = of["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif event.get("method") == "Log.entryAdded" and of["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{of['entry']['text']} {of['entry'].get('url', '')}")

    def open(self, address: str) -> None:
        """Go to an address and wait until it is loaded."""
        self.ask("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What an expression, or the promise that it is, comes to in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", expression))
        return answer["result"].get("value")

    def of(self, selector: str, expression: str) -> Any:
        """The value of an expression of the element ``e`` that a selector finds first."""
        return self.value(f"(e => {expression})(document.querySelector({json.dumps(selector)}))")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; its value."""
        deadline = time.monotonic() + seconds
        while not (found := self.value(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} is still {found!r}; the page complains: {self.complaints}")
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of an element."""
        scroll = "e.scrollIntoView({block: 'nearest', behavior: 'instant'})"
        box = "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
        x, y = self.of(selector, f"(() => {{ {scroll}; {box}; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Text where the caret is."""
        self.ask("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key down and up."""
        common = dict(key=key, code=key, windowsVirtualKeyCode=code)
        self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an input."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def look(self, width: int, height: int, scheme: str) -> None:
        """The size of the window, and light or dark."""
        mobile = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.ask("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])

    def screenshot(self, out: Path) -> Path:
        """What the window shows, as PNG."""
        out.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))
        return out

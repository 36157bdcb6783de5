"""Pages looked at in headless Chromium: pictures of them, and what is wrong with them."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

SMALLEST = 11
"""Pixels that the boxes of letters in pictures are high at least."""

FAULTS = """(() => {
  const faults = [], wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) {
    faults.push(`the page is ${document.documentElement.scrollWidth} wide, the window ${wide}`);
    for (const one of document.querySelectorAll('main *'))
      if (one.getBoundingClientRect().right > wide + 1 && !one.closest('.scroll, pre, svg'))
        faults.push(`${one.tagName} sticks out: ${one.textContent.slice(0, 40)}`);
  }
  const boxOf = one => one.getBoundingClientRect();
  const outside = (a, b) =>
    a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  const over = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  for (const picture of document.querySelectorAll('svg')) {
    const texts = [...picture.querySelectorAll('text')].map(one => [one.textContent.trim(), boxOf(one)]);
    texts.forEach(([text, box], at) => {
      const height = Math.min(box.height, box.width);
      if (height < SMALLEST && text.length > 1) faults.push(`"${text}" is ${height.toFixed(1)} pixels high`);
      if (outside(box, boxOf(picture))) faults.push(`"${text}" sticks out of its picture`);
      for (const [other, own] of texts.slice(at + 1)) if (over(box, own)) faults.push(`"${text}" lies over "${other}"`);
    });
  }
  return faults;
})()""".replace("SMALLEST", str(SMALLEST))


class Browser:
    """Chromium, driven through its pipe: one page."""

    def __init__(self, process: "subprocess.Popen[bytes]", to: int, come: int) -> None:
        self._process, self._to, self._come = process, to, come
        self._rest, self._number, self._session, self._own = b"", 0, "", "file:"
        self.complaints: list[str] = []
        page = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._ask("Target.attachToTarget", {"targetId": page, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def look(self, page: Path | str, width: int, dark: bool, picture: Path | None = None) -> list[str]:
        """Open a page, a file or a URL, say what is wrong with it, and take a picture of all of it.

        Returns:
            Messages of the console, requests for other files, and what `FAULTS` finds.
        """
        self.complaints = []
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", {"features": [scheme]})
        url = page if isinstance(page, str) else page.as_uri()
        self._own = url if isinstance(page, str) else "file:"
        self._ask("Page.navigate", {"url": url})
        self._wait("Page.loadEventFired")
        found = self.faults()
        if picture is not None:
            self.picture(picture, width)
        return found

    def picture(self, path: Path, width: int) -> None:
        """Take a picture of all of the page."""
        taken = self._ask(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"} | self._clip(width)
        )
        path.write_bytes(base64.b64decode(taken["data"]))

    def faults(self) -> list[str]:
        """What is wrong with the page as it is now; as `look`."""
        found = self._ask("Runtime.evaluate", {"expression": FAULTS, "returnByValue": True})
        return [*self.complaints, *found["result"].get("value", [str(found)])]

    def run(self, script: str) -> Any:
        """What a line of JavaScript gives on the page."""
        return self._ask("Runtime.evaluate", {"expression": script, "returnByValue": True})["result"].get("value")

    def _clip(self, width: int) -> dict[str, Any]:
        height = min(self.run("document.documentElement.scrollHeight"), 12000)
        return {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}

    def _ask(self, method: str, parameters: dict[str, Any] | None = None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _wait(self, event: str) -> None:
        while self._next().get("method") != event:
            pass

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._come, 1 << 20)
            assert data, "the browser is gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        kind, about = found.get("method"), found.get("params", {})
        if kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(f"console: {json.dumps(about)[:300]}")
        if kind == "Network.requestWillBeSent" and not about["request"]["url"].startswith(
            (self._own, "data:", "about:", "blob:")
        ):
            self.complaints.append(f"the page asks for {about['request']['url']}")
        return found


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window, with a profile of its own; ends with the block."""
    assert CHROMIUM is not None
    to_read, to = os.pipe()
    come, come_write = os.pipe()
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    words += ["--no-first-run", "--disable-dev-shm-usage", "--disable-component-update", "--remote-debugging-pipe"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads from descriptor 3 and writes to 4.
        shell = f'exec 3<&{to_read} 4>&{come_write} && exec "$0" "$@"'
        process = subprocess.Popen(
            ["bash", "-c", shell, CHROMIUM, *words, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, come_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(come_write)
        try:
            yield Browser(process, to, come)
        finally:
            process.terminate()
            process.wait(timeout=30)
            os.close(to)
            os.close(come)

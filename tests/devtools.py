"""Drive Chromium by its DevTools protocol; no driver is needed, only the browser."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars")


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    found = (shutil.which(name) for name in (os.environ.get("CHROME_BIN", ""), *NAMES) if name)
    return next(filter(None, found), None)


class Browser:
    """One page of a browser that runs without a window; its requests are kept in `requests`."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 900)):
        command = [find_browser(), *FLAGS, *QUIET, f"--user-data-dir={profile}"]
        command += ["--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.count, self.requests, port_file = 0, [], profile / "DevToolsActivePort"
        self.wait(lambda: port_file.exists() and len(port_file.read_text().splitlines()) == 2, "the browser")
        port, path = port_file.read_text().splitlines()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=30)
        [page] = [one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self.session = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Network", "DOM"):
            self(f"{part}.enable")
        self("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)

    def __call__(self, method: str, **parameters) -> dict:
        """Send a command and wait for its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while (answer := json.loads(self.socket.recv())).get("id") != self.count:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def run(self, script: str):
        """The value of an expression of JavaScript."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (script, answer)
        return answer["result"].get("value")

    def wait(self, condition, what: str, seconds: float = 90):
        """Ask until a function, or an expression of JavaScript, is true; its value."""
        end = time.monotonic() + seconds
        while not (value := condition() if callable(condition) else self.run(condition)):
            assert time.monotonic() < end, f"{what} did not appear within {seconds} s"
            time.sleep(0.1)
        return value

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> Path:
        """Write what the page shows as PNG."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))
        return path

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

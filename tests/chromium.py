"Chromium without a window, driven as its developer tools drive it: real clicks, keys, files and drops."

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patience import PATIENCE, wait_until
from tornado.websocket import websocket_connect

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-port=0"


class Browser:
    "One page. What it requests and complains about is kept."

    def __init__(self, profile: Path):
        program = next(filter(None, map(shutil.which, BROWSERS)))
        command = [program, *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told, self.loop, self.number = profile / "DevToolsActivePort", asyncio.new_event_loop(), 0
        self.events: list[tuple[str, dict]] = []
        wait_until(lambda: told.is_file() and "\n" in told.read_text(), "the developer tools", self.process)
        with urllib.request.urlopen(f"http://127.0.0.1:{told.read_text().split()[0]}/json/list") as listed:
            pages = [page for page in json.load(listed) if page["type"] == "page"]
        self.socket = self._wait(websocket_connect, pages[0]["webSocketDebuggerUrl"], max_message_size=1 << 28)
        for domain in ("Page", "Network", "Log", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def _wait(self, begin: Callable[..., Any], *values: Any, **more: Any) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(begin(*values, **more), PATIENCE)

        return self.loop.run_until_complete(bounded())

    def _read(self) -> dict:
        message = json.loads(self._wait(self.socket.read_message))
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def call(self, method: str, **params: Any) -> dict:
        "Send a command of the DevTools protocol and return its result."
        self.number += 1
        number = self.number
        self._wait(self.socket.write_message, json.dumps({"id": number, "method": method, "params": params}))
        while (message := self._read()).get("id") != number:
            pass
        assert "error" not in message, (method, message)
        return message["result"]

    def js(self, expression: str) -> Any:
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.js(expression):
            assert time.monotonic() < deadline and self.process.poll() is None, expression
            time.sleep(0.05)

    def wait_event(self, method: str) -> dict:
        while not (found := [params for name, params in self.events if name == method]):
            self._read()
        return found[-1]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def choose(self, selector: str, paths: list[Path]) -> None:
        "Choose files, as in the dialog."
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def drop(self, selector: str, paths: list[Path]) -> None:
        "Drag files onto an element and let go."
        box = self.js(f"(r => [r.x + 9, r.y + 9])(document.querySelector('{selector}').getBoundingClientRect())")
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)

    def key(self, name: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)

    def shot(self, path: Path) -> None:
        height = self.js("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.js("innerWidth"), "height": height, "scale": 1}
        told = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def requested(self) -> list[str]:
        return [params["request"]["url"] for name, params in self.events if name == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        logged = [params["entry"]["text"] for name, params in self.events if name == "Log.entryAdded"]
        return logged + [str(params) for name, params in self.events if name == "Runtime.exceptionThrown"]

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(PATIENCE)
        self.loop.close()

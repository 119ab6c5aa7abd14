"""A headless Chromium that opens the real frontend: Chrome DevTools Protocol over aiohttp, which ComfyUI brings.

Any Chromium will do: see `chromium` in dev.py.
"""
import asyncio
import base64
import os
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

import dev

READY = "window.app?.graph && window.app.extensionManager && window.LiteGraph?.registered_node_types.LEDITS_KSampler"


class Page:
    """One page of a browser of its own. Use in a `with` block.

    Args:
        size: of the window, in pixels.
    """

    def __init__(self, size=(1920, 1080)):
        self.size, self.errors, self._count = size, [], 0
        self._loop = asyncio.new_event_loop()

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="ledits-chromium-", ignore_cleanup_errors=True)
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [dev.chromium(), "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={self._folder.name}", *root,
             f"--window-size={self.size[0]},{self.size[1]}", "--hide-scrollbars", "--no-first-run", "--disable-gpu",
             "--disable-dev-shm-usage", "--disable-extensions", "--no-proxy-server", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._loop.run_until_complete(self._connect())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if hasattr(self, "_session"):
            self._loop.run_until_complete(self._session.close())
        self._process.terminate()
        self._process.wait()
        self._loop.close()
        self._folder.cleanup()

    async def _connect(self):
        port_file, end = Path(self._folder.name, "DevToolsActivePort"), time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text()):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{dev.chromium()} did not start.")
            await asyncio.sleep(0.1)
        url = f"http://127.0.0.1:{port_file.read_text().split()[0]}/json/list"
        self._session = aiohttp.ClientSession()
        async with self._session.get(url) as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        await self._send("Runtime.enable")
        await self._resize(self.size)

    async def _resize(self, size):
        await self._send("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                         mobile=False)

    async def _send(self, method, **parameters):
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=600)
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def send(self, method, **parameters):
        """A command of the DevTools Protocol; its result."""
        return self._loop.run_until_complete(self._send(method, **parameters))

    def resize(self, size):
        """Give the window another size, in pixels."""
        self._loop.run_until_complete(self._resize(size))

    def run(self, script):
        """Evaluate JavaScript in the page and wait for it; its value.

        Raises:
            RuntimeError: the script's own error.
        """
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["result"].get("description") or result["exceptionDetails"]["text"])
        return result["result"].get("value")

    def wait(self, condition, seconds=120):
        """Until the JavaScript condition holds; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition)):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {condition}")
            time.sleep(0.2)
        return value

    def open(self, url):
        """Open ComfyUI and wait until it can be used."""
        self.send("Page.navigate", url=url)
        self.wait(READY)

    def screenshot(self, path):
        """Write what the window shows to a PNG or JPEG file."""
        kind = "png" if Path(path).suffix == ".png" else "jpeg"
        data = self.send("Page.captureScreenshot", format=kind, **({} if kind == "png" else {"quality": 85}))["data"]
        Path(path).write_bytes(base64.b64decode(data))

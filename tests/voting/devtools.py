"""A headless browser that is driven over its DevTools protocol by two pipes: no port, no further package."""

import base64
import json
import os
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from browser import FOUND, NEEDS_BROWSER  # noqa: F401

ARGUMENTS = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-extensions", "--disable-sync", "--disable-default-apps", "--remote-debugging-pipe"]


class Browser:
    """Commands, answers and events of a browser."""

    def __init__(self, into, out):
        self.into, self.out, self.rest, self.number, self.events = into, out, b"", 0, []

    def call(self, method, session=None, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while True:
            found = self.read(60)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def read(self, limit):
        until = time.monotonic() + limit
        while b"\0" not in self.rest:
            assert select.select([self.out], [], [], max(0.0, until - time.monotonic()))[0], "the browser does not answer"
            self.rest += os.read(self.out, 2**20)
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)


class Tab:
    """A tab that notes what its page asks for and says on the console."""

    def __init__(self, browser, address, width=900, dark=False, height=844):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        if dark:
            self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        self.call("Page.navigate", url=address)

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def value(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression, limit=60):
        """Wait until an expression is true."""
        end = time.monotonic() + limit
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)

    def press(self, *keys):
        for key in keys:
            text = {" ": {"text": " "}, "Enter": {"text": "\r"}}.get(key, {})
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, code="Space" if key == " " else key)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code="Space" if key == " " else key)

    def click(self, selector):
        """Click in the middle of an element, as a hand does."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
            "const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screenshot(self, file):
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)["data"]))

    def requests(self):
        """Addresses that were asked for, without those inside the page."""
        seen = [event for event in self.browser.events if event.get("sessionId") == self.session]
        found = [event["params"]["request"]["url"] for event in seen if event["method"] == "Network.requestWillBeSent"]
        return [address for address in found if not address.startswith("data:")]

    def complaints(self):
        """Errors and warnings of the page."""
        seen = [event for event in self.browser.events if event.get("sessionId") == self.session]
        thrown = [event["params"] for event in seen if event["method"] == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"]["text"] for event in seen if event["method"] == "Log.entryAdded"]
        return thrown + logged + [event["params"]["type"] for event in seen if event["method"] == "Runtime.consoleAPICalled"]

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)


@contextmanager
def browsing(folder):
    """A browser with a profile of its own."""
    reads, into = os.pipe()
    out, writes = os.pipe()
    arguments = [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    command = f'exec "$@" 3<&{reads} 4>&{writes}'
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", FOUND, *arguments], pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(reads)
    os.close(writes)
    browser = Browser(into, out)
    try:
        yield browser
        browser.call("Browser.close")
    finally:
        os.close(into)
        os.close(out)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

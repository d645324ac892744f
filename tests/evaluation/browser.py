"""A page in a headless browser: what it shows, says and asks for."""

import json
import os
import re
import shutil
import subprocess

import attrs
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
FOUND = next(filter(None, map(shutil.which, NAMES)), None)
NEEDS_BROWSER = pytest.mark.skipif(FOUND is None, reason=f"needs a browser: none of {', '.join(NAMES)} is on the PATH")

PROBE = """
<script>
function shown(element) { return getComputedStyle(element).display != "none" && element.getBoundingClientRect().width > 0; }
window.addEventListener("load", function () {
  var result = {
    width: innerWidth, needed: document.documentElement.scrollWidth, title: document.title,
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    images: [...document.images].map(image => [image.complete, image.naturalWidth, shown(image)]), enlarged: [],
  };
  document.querySelectorAll("a.small").forEach(function (link) {
    location.hash = link.getAttribute("href");
    var large = document.querySelector(link.getAttribute("href"));
    var image = large.querySelector("img").getBoundingClientRect();
    var open = [shown(large), image.width, link.querySelector("img").getBoundingClientRect().width];
    location.hash = large.getAttribute("href");
    result.enlarged.push([...open, shown(large)]);
  });
  document.body.innerHTML = "<pre id=probe>" + JSON.stringify(result).replaceAll("<", "&lt;") + "</pre>";
});
</script></body>
"""


@attrs.frozen
class Visit:
    """What a browser made of a page: the probe's numbers, console lines, and addresses that were asked for."""

    probe: dict
    console: list
    requests: list


def visit(page, folder, width=390):
    """Open a copy of a page that measures itself, from the disk, in a window as wide as a phone."""
    copy = folder / "probe.html"
    copy.write_text(page.read_text().replace("</body>", PROBE), encoding="utf-8")
    log = folder / "net.json"
    arguments = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-extensions", "--disable-sync", "--disable-default-apps", "--dump-dom"]
    arguments += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", f"--window-size={width},844", "--enable-logging=stderr"]
    if os.name == "posix" and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    done = subprocess.run([FOUND, *arguments, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-500:]
    # what the browser asks for by itself has no page as its origin
    asked = re.findall(r'\{[^{}]*"initiator":"(?:file://|null)[^{}]*"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text())
    probe = json.loads(found[1].replace("&lt;", "<").replace("&amp;", "&"))
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return Visit(probe, console, sorted({*asked, *probe["requests"]}))

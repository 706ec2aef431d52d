"""A Snakemake report in headless Chromium: what it shows, what breaks, what wants a network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Timers run as fast as the page does.
    "--virtual-time-budget=60000",
)
# What is not in the file itself is refused, and told.
WATCH = """
<meta http-equiv="Content-Security-Policy"
    content="default-src 'unsafe-inline' 'unsafe-eval' data: blob:">
<script>
const seen = {errors: [], requests: [], categories: {}, descriptions: {}, widths: {}};
addEventListener("error", event => seen.errors.push(event.message));
addEventListener("unhandledrejection", event => seen.errors.push(String(event.reason)));
console.error = (...words) => seen.errors.push(words.join(" "));
addEventListener("securitypolicyviolation", event => seen.requests.push(event.blockedURI));
</script>
"""
# Reads the front page, then opens every category, every description and every image.
VISIT = """
<script>
const shown = () => new Promise(done => setTimeout(done, 50));
async function show(path) {
    app.showResultInfo(path);
    await shown();
    seen.descriptions[path] = document.querySelector("nav").innerText;
    if (results[path].mime_type.startsWith("image/")) {
        app.setView({content: "img", contentPath: results[path].data_uri});
        await shown();
        const image = [...document.images].find(other => other.src == results[path].data_uri);
        if (!image.complete) await new Promise(done => image.onload = image.onerror = done);
        seen.widths[path] = image.naturalWidth;
    }
}
async function visit() {
    await shown();
    seen.front = document.querySelector("#app").innerText;
    seen.top = document.querySelector("h1.title").getBoundingClientRect().top;
    for (const category of Object.keys(categories)) {
        app.showCategory(category);
        await shown();
        seen.categories[category] = document.querySelector("nav").innerText;
        for (const path of Object.values(categories[category]).flat()) await show(path);
    }
}
addEventListener("load", () => visit().catch(reason => seen.errors.push(String(reason)))
    .finally(() => {
        const said = document.createElement("pre");
        said.id = "seen";
        said.textContent = JSON.stringify(seen);
        document.body.replaceChildren(said);
    }));
</script>
"""


def visit(report: str, folder: Path) -> dict[str, Any]:
    """Open every part of a report and say what was seen; skips where Chromium is missing.

    Args:
        report: the HTML file's text.
        folder: an empty one.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    page = folder / "watched.html"
    page.write_text(report.replace("<head>", "<head>" + WATCH, 1) + VISIT)
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen

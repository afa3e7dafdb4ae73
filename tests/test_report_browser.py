"""The report in a browser: no error, no request, every link resolves, a click marks what belongs together.

Needs Debian's chromium; without it the test says that it was skipped. Nothing else drives it: what looks at the page is a
script in a copy of it, and the browser prints the page that this leaves.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stir, tiny

import peftc
from peftc.export.bundle import export
from peftc.language.reader import load_spec
from peftc.report import report
from peftc.report.changes import FOLDED
from peftc.report.subject import Subject, of_bundle, of_specs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

# Hears what goes wrong from the start.
FIRST = """<script>
window.wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => wrong.push(event.violatedDirective));
const say = console.error;
console.error = (...said) => { wrong.push(said.join(" ")); say(...said); };
</script>"""
# Clicks on the first of each sort, and tells what is marked then.
LAST = """<script>
const ids = (what) => [...document.querySelectorAll(what)].map((one) => one.id || one.dataset.is);
const click = (one) => {
  one.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  const marked = ids(".lit");
  document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
  return marked;
};
const first = (what) => document.querySelector(what);
const resolves = [...document.querySelectorAll("[data-is]")].every((one) =>
  [...(one.dataset.of || "").split(" "), ...(one.dataset.in || "").split(" ")].filter(Boolean).every((word) =>
    document.querySelector(`[data-is~="${word}"]`)));
const line = first(".code .of"), step = first("#graph .step.inserted, #graph .step.folded");
const node = first("#onnx .step.inserted"), block = first("#graph summary[data-is]");
const start = first("#graph [tabindex='0']");
start.focus();
start.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
const next = document.activeElement;
next.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
const keys = {moved: next !== start && first("#graph").contains(next), stops: ids("[tabindex='0'][data-is]").length};
document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
const told = {
  keys, unnamed: [...document.querySelectorAll("[role=button], summary")].filter((one) => !one.textContent.trim()).length,
  wrong, resolves, ready: document.documentElement.dataset.ready,
  fetched: performance.getEntriesByType("resource").map((one) => one.name),
  items: document.querySelectorAll("[data-is]").length,
  line: line && {entry: line.dataset.is, marked: click(line)},
  step: step && {id: step.id, of: step.dataset.of, marked: click(step)},
  node: node && {of: node.dataset.of, marked: click(node)},
  block: block && {id: block.id, marked: click(block)},
  left: ids(".lit"),
  wide: document.documentElement.scrollWidth, window: innerWidth,
};
const out = document.createElement("pre");
out.id = "result";
out.textContent = JSON.stringify(told);
document.body.append(out);
</script>"""


def looked_at(html: str, folder: Path, width: int) -> dict[str, Any]:
    """What the scripts tell of a page in a window of this width."""
    page = folder / "page.html"
    page.write_text(html.replace("<head>", f"<head>{FIRST}").replace("</body>", f"{LAST}</body>"))
    done = subprocess.run(
        [
            *(
                str(CHROMIUM),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
            ),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-dev-shm-usage", "--no-first-run"),
            *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"),
            *("--virtual-time-budget=4000", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    said: dict[str, Any] = json.loads(unescape(found[1]))
    return said


@pytest.fixture(scope="module", params=["mam bundle", "lora on bert", "mam on bart"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if request.param == "lora on bert":
        return of_specs(tiny("bert"), [load_spec("lora")])
    if request.param == "mam on bart":
        return of_specs(tiny("bart"), [load_spec("mam")])
    path = tmp_path_factory.mktemp("browser") / "bundle"
    with torch.no_grad():
        export(stir(peftc.compile(tiny("bert"), "mam")), path)
    return of_bundle(path)


@pytest.mark.parametrize("width", [1280, 500])
def test_a_click_marks_what_belongs_together(subject: Subject, width: int, tmp_path: Path) -> None:
    page = report.page(subject)
    said = looked_at(page.html(), tmp_path, width)
    assert said["wrong"] == [] and said["fetched"] == []
    assert said["resolves"] and int(said["ready"]) == said["items"]
    assert said["wide"] <= said["window"]  # nothing is cut off at the right
    assert said["keys"] == {"moved": True, "stops": 2 + bool(page.onnx)} and said["unnamed"] == 0
    shown = [*page.graph.root.steps()]
    own = {int(one.removeprefix("e")) for one in said["line"]["entry"].split()}
    steps = {f"n{i}" for i, step in enumerate(shown) if own & set(step.entries)}
    assert steps <= set(said["line"]["marked"])
    first, *_ = said["step"]["of"].split()
    marked = said["step"]["marked"]
    assert said["step"]["id"] in marked
    lines = {
        f"f{i}l{line.number}"
        for i, sheet in enumerate(page.sheets)
        for line in sheet.lines
        if int(first.removeprefix("e")) in line.entries and not line.parameter
    }
    assert lines and lines <= set(marked)
    assert said["block"]["id"] in said["block"]["marked"] and len(said["block"]["marked"]) > 3
    if page.onnx:
        ours = {word for word in said["node"]["of"].split() if word.startswith("n")}
        assert ours and ours <= set(said["node"]["marked"])
        assert any(step.state == FOLDED for step in shown)
    assert said["left"] == []

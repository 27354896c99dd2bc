"""The report as a browser lays it out, on a phone and on a desk."""

from __future__ import annotations

import html as markup
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.run_report_files import page_of, run_files
from train_and_ship.registry.report.html import html

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
# A frame of the size of a screen: what a browser makes of its window it decides itself.
FRAME = """<!doctype html><body><iframe id="f" style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
document.getElementById("f").addEventListener("load", () => {{
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const wide = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);
  const texts = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height).filter(h => h > 0);
  const said = {{seen: root.clientWidth, needs: root.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 120)),
                letters: Math.min(...texts), charts: page.querySelectorAll("svg").length}};
  document.body.insertAdjacentHTML("beforeend", "<pre id=said></pre>");
  document.getElementById("said").textContent = JSON.stringify(said);
}});
</script>"""


@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_nothing_is_wider_than_the_screen_and_charts_can_be_read(width: int, tmp_path: Path) -> None:
    document = html(page_of(run_files()))
    path = tmp_path / "frame.html"
    path.write_text(FRAME.format(width=width, page=markup.escape(document)))
    argv = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*argv, "--virtual-time-budget=2000", "--window-size=1400,900", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    said = json.loads(markup.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)[1]))  # type: ignore[index]
    assert said["seen"] <= width and said["needs"] <= said["seen"], said
    assert said["wide"] == [] and said["charts"] == 11
    assert said["letters"] >= 9, "pixels"

"""Draws the diagrams of docs/ for the site, as pictures that need no script: `python -m tests.support.diagrams`.

GitHub draws Mermaid's text by itself. Needs npm and Chromium, and only when a diagram has changed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

from tests.support.projects import REPOSITORY

PAGES, DRAWN = REPOSITORY / "docs", REPOSITORY / "docs" / "site"
VERSION = "11"
BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = """<html><body><script src="package/dist/mermaid.min.js"></script><script>
mermaid.initialize({startOnLoad: false, htmlLabels: false, flowchart: {htmlLabels: false}, fontFamily: "sans-serif"});
mermaid.render("drawn", %s).then(({svg}) => { document.body.textContent = btoa(unescape(encodeURIComponent(svg))); });
</script></body></html>"""


def diagrams() -> dict[str, str]:
    """The name of each diagram's picture, and its text."""
    blocks = [block for page in sorted(PAGES.rglob("*.md")) for block in BLOCK.findall(page.read_text())]
    return {f"diagram-{hashlib.sha256(block.encode()).hexdigest()[:12]}.svg": block for block in blocks}


def main() -> None:
    """Write what is missing, and remove what no page has any more."""
    wanted = diagrams()
    for old in DRAWN.glob("diagram-*.svg"):
        if old.name not in wanted:
            old.unlink()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        subprocess.run(
            ["npm", "pack", f"mermaid@{VERSION}", "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = folder.glob("mermaid-*.tgz")
        subprocess.run(["tar", "xzf", archive, "package/dist/mermaid.min.js"], cwd=folder, check=True)
        for name, text in wanted.items():
            (folder / "page.html").write_text(PAGE % json.dumps(text))
            words = [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--virtual-time-budget=20000",
                "--dump-dom",
            ]
            done = subprocess.run([*words, (folder / "page.html").as_uri()], capture_output=True, text=True, check=True)
            found = re.search(r"<body>([A-Za-z0-9+/=]+)</body>", done.stdout)
            assert found is not None, f"{name} was not drawn:\n{text}\n{done.stdout[-500:]}"
            (DRAWN / name).write_bytes(base64.b64decode(found[1]))
            print(DRAWN / name)


if __name__ == "__main__":
    main()

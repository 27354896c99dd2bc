"""Writes the page that says what became of every model of the zoo.

python -m tests.zoo > docs/exports.md
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from tests.support.zoo.animals import ZOO
from tests.support.zoo.export_page import EDGE, USUAL, page, visit


def main() -> None:
    if importlib.util.find_spec("executorch") is None:
        raise SystemExit("the page is written with every format: pip install executorch==1.5.1")
    chosen = [animal for animal in ZOO if not sys.argv[1:] or animal.name in sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        usual, edge = (visit(Path(folder) / kinds[0], kinds, chosen) for kinds in (USUAL, EDGE))
        print(page({name: row | edge[name] for name, row in usual.items()}), end="")


if __name__ == "__main__":
    main()

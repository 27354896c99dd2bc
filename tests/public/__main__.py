"""Asks public architectures what a run would, exports them, and writes the page of what was said.

    build/public/bin/python -m tests.public > docs/public-models.md
    build/public/bin/python -m tests.public ViT BERT      # these, with all that was said

Exits with 1 when something is said of one that is not right.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.public.architectures import ARCHITECTURES, BY_NAME, Architecture
from tests.support.public.asking import Answer, ask, page
from tests.support.public.exporting import FORMATS, became, mistakes


def main() -> int:
    chosen = [BY_NAME[name] for name in sys.argv[1:]] or list(ARCHITECTURES)
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip((item.name for item in chosen), pool.map(_asked, chosen), strict=True))
        # Each in a process of its own.
        files = dict(zip((item.name for item in chosen), pool.map(_exported, chosen), strict=True))
    wrong = {
        item.name: found
        for item in chosen
        if (found := answers[item.name].mistakes(item) + mistakes(item, files[item.name]))
    }
    if sys.argv[1:]:
        for name, answer in answers.items():
            print(answer.text, *(f"{kind}: {what}" for kind, what in files[name].items()), sep="\n")
    elif not wrong:
        # Its rows are what is right.
        print(page(answers, files), end="")
    for name, found in wrong.items():
        print(f"{name}:", *found, sep="\n  ", file=sys.stderr)
    return 1 if wrong else 0


def _asked(item: Architecture) -> Answer:
    with tempfile.TemporaryDirectory(prefix="public-") as folder:
        return ask(item, Path(folder))


def _exported(item: Architecture) -> dict[str, str]:
    return {kind: became(item.name, kind) for kind in FORMATS}


if __name__ == "__main__":
    sys.exit(main())

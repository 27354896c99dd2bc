"""An environment that has torch and torchworker and nothing else of ours: what `python:` of a job may name.

It is made of links into this one, so it costs a tenth of a second: packages that torchworker's own list of requirements
leads to, by what each says of its files.
"""

from __future__ import annotations

import re
import sys
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

EXPORTS = "torchworker[exports]"


def requirements(*names: str) -> dict[str, metadata.Distribution]:
    """The distributions that these lead to, themselves included. names: as pip takes them, `torchworker[exports]`."""
    found: dict[str, metadata.Distribution] = {}
    left = list(names)
    while left:
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", left.pop()).groups()  # type: ignore[union-attr]
        try:
            item = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # For another platform.
            continue
        seen = item.metadata["Name"] in found
        found[item.metadata["Name"]] = item
        for line in item.requires or ():
            needed, _, condition = line.partition(";")
            extra = re.search(r"""extra == ["']([\w-]+)["']""", condition)
            if (extra is None and not seen) or (extra is not None and extra[1] in (extras or "").split(",")):
                left.append(re.match(r"[\w.-]+(\[[\w,-]+\])?", needed.strip())[0])  # type: ignore[index]
    return found


def make_environment(folder: Path, *names: str, without: Sequence[str] = ()) -> Path:
    """Make a virtual environment; returns its interpreter.

    Args:
        folder: to be made.
        names: what it has, with all that they lead to.
        without: names of distributions that are left out.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, item in requirements(*names).items():
        if name not in without:
            for top in {file.parts[0] for file in item.files or () if file.parts[0] not in ("..", "__pycache__")}:
                link = site / top
                if not link.exists():
                    link.symlink_to(item.locate_file(top))  # type: ignore[arg-type]
    return folder / "bin" / "python"


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1]), EXPORTS))

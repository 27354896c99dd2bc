"""The worker of the local stack. Arguments: those of `prefect`.

Prefect's runner makes a folder `runner_storage` below the machine's folder for temporary files, of whoever comes first:
the worker of a second user cannot start (3.8.8). This one has a folder of its own; its runs have the machine's.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from train_and_ship.infra import private
from train_and_ship.infra.home import make_folder


def main() -> None:
    """Run `prefect` in this process."""
    tempfile.tempdir = str(make_folder(Path(os.environ["PREFECT_HOME"], "tmp")))
    sys.argv.insert(1, "prefect")
    private.main()


if __name__ == "__main__":
    main()

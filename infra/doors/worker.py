"""The worker of the local stack. Arguments: those of `prefect`.

Prefect's runner makes a folder `runner_storage` below the machine's folder for temporary files, of whoever comes first:
the worker of a second user cannot start (3.8.8). This one has a folder of its own; its runs have the machine's.

For a run whose deployment names no command, Prefect starts two interpreters, each of which imports Prefect: one finds
out where the code lies, and then starts the other. The code of these flows is installed, so here it is one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from prefect.utilities.processutils import command_to_string
from prefect.workers.process import ProcessJobConfiguration

from train_and_ship.infra import private
from train_and_ship.infra.home import make_folder


def main() -> None:
    """Run `prefect` in this process."""
    tempfile.tempdir = str(make_folder(Path(os.environ["PREFECT_HOME"], "tmp")))
    one_process_a_run()
    sys.argv.insert(1, "prefect")
    private.main()


def one_process_a_run() -> None:
    """Have the worker start the engine itself where a deployment names no command."""
    prepare = ProcessJobConfiguration.prepare_for_flow_run

    def prepared(self: ProcessJobConfiguration, *arguments: Any, **named: Any) -> None:
        self.command = self.command or command_to_string([sys.executable, "-P", "-m", "prefect.engine"])
        prepare(self, *arguments, **named)

    ProcessJobConfiguration.prepare_for_flow_run = prepared  # type: ignore[method-assign]


if __name__ == "__main__":
    main()

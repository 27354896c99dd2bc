"""Where the processes of a job are forked: in the environment of its code, and in the clean room's, which is ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchworker.contract import WITHOUT_CODE
from train_and_ship.infra.fork_server import ForkServer, fork_server
from train_and_ship.infra.interpreter import Interpreter, our_interpreter
from train_and_ship.registry.environments import Environments

LOADS_WHERE_MADE = frozenset(["aoti", "executorch", "pt2e-int8"])
"""Formats that are compiled against the torch, or for the library, of whoever makes them."""


def bound(formats: Iterable[str], libraries: Sequence[str] = ()) -> tuple[str, ...]:
    """Those formats that only load in an environment like the one that made them.

    Args:
        formats: which there are.
        libraries: of operators, compiled against that torch; what carries code may call them.
    """
    code = [kind for kind in formats if kind not in WITHOUT_CODE]
    return tuple(kind for kind in code if libraries or kind in LOADS_WHERE_MADE)


@dataclass(frozen=True)
class Rooms:
    """Two environments, which are one where the job has none of its own. Each starts on first use."""

    interpreter: Interpreter
    """Of the job's code."""
    log: Path
    """Of what forks in the clean room; the other's lies beside it."""

    @property
    def project(self) -> ForkServer:
        """Where the code of the job runs."""
        return fork_server(self.log, self.interpreter)

    @property
    def clean(self) -> ForkServer:
        """Where artifacts are proven without it, in another environment than the one that made them."""
        return fork_server(self.log)

    def where_made(self, formats: Iterable[str], libraries: Sequence[str] = ()) -> tuple[str, ...]:
        """Those formats that are proven where they were made; none where that is the clean room's environment.
        Arguments: as of `bound`."""
        return () if self.interpreter.ours else bound(formats, libraries)

    def environments(self, formats: Iterable[str], libraries: Sequence[str] = ()) -> Environments:
        """For the record of a release. Arguments: as of `bound`."""
        return Environments(
            made=self.interpreter.facts(),
            proven=our_interpreter().facts(),
            where_made=self.where_made(formats, libraries),
        )

    def for_all(self, formats: Iterable[str], libraries: Sequence[str] = ()) -> ForkServer:
        """Where all of these load side by side. Arguments: as of `bound`."""
        return self.project if self.where_made(formats, libraries) else self.clean

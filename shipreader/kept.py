"""What of requests is kept: what the job of a release names, and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shipreader.errors import ReaderError
from shipreader.observation_files import MOST_COLUMNS
from shipreader.records import Release

JOB, JOB_BYTES = "job.json", 2**20
"""The file of a release that says what is kept; longer ones are not read."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What is kept of requests."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sample: float = 1.0
    """The share of requests; the same ones in every process, by their id."""

    def __post_init__(self) -> None:
        # A text has letters, which are texts too.
        sides = [isinstance(names, str) or not all(isinstance(name, str) for name in names) for names in self._sides]
        if any(sides) or max(map(len, self._sides)) > MOST_COLUMNS:
            raise ReaderError(f"columns: expected at most {MOST_COLUMNS} names of inputs and of outputs, got {self}")
        number = isinstance(self.sample, int | float) and not isinstance(self.sample, bool)
        if not number or not 0 < self.sample <= 1:
            raise ReaderError(f"sample: expected a share above 0 and at most 1, got {self.sample!r}")

    @property
    def _sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.inputs, self.outputs

    @classmethod
    def of(cls, columns: Mapping[str, Iterable[str]] | None, sample: float = 1.0) -> Kept:
        """columns: of `inputs` and `outputs`. Raises ReaderError for what can be neither."""
        columns = columns or {}
        if not isinstance(columns, Mapping) or not columns.keys() <= {"inputs", "outputs"}:
            raise ReaderError(f"columns: expected inputs and outputs, each with names, got {columns!r:.200}")
        if wrong := [names for names in columns.values() if not isinstance(names, list | tuple)]:
            raise ReaderError(f"columns: expected lists of names, got {wrong[0]!r:.200}")
        return cls(tuple(columns.get("inputs", ())), tuple(columns.get("outputs", ())), sample)


def kept_by_job(release: Release) -> Kept | None:
    """What the job of a verified release says is kept; None where it has no `observe`, or one that cannot be read."""
    try:
        with (release.folder / JOB).open("rb") as file:
            document = json.loads(file.read(JOB_BYTES + 1)[: JOB_BYTES + 1])
        said = document.get("observe")
        return None if said is None else Kept.of(said.get("columns"), said.get("sample", 1.0))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError, ReaderError) as error:
        _log.warning("%s %s: nothing of requests is kept: %s: %s", release.model, release.id, JOB, error)
        return None

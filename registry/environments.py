"""In which environments a release was made and proven. No store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train_and_ship.infra.shown import on_one_line

LONGEST = 80
"""Characters that are shown of a version."""


@dataclass(frozen=True, kw_only=True)
class Environments:
    """The same twice where a job has no environment of its own."""

    made: Mapping[str, str]
    """Of the job's code: versions of `python`, `torch` and `torchworker`, and the `platform`."""
    proven: Mapping[str, str]
    """The same of the clean room."""
    where_made: Sequence[str] = ()
    """Formats that only load where they were made, and were proven there."""

    def in_words(self) -> str:
        """Where it was proven, for people; empty where that is where it was made."""
        if self.made == self.proven and not self.where_made:
            return ""
        there = f"; {', '.join(self.where_made)} where made, because they load nowhere else" if self.where_made else ""
        return f"made with {self.made_with}; proven with {_versions(self.proven)}{there}"

    @property
    def made_with(self) -> str:
        """The environment of the job's code, in words."""
        return _versions(self.made)


def _versions(facts: Mapping[str, str]) -> str:
    # A release may be somebody else's, and say anything.
    python, torch, platform = (
        on_one_line(facts.get(name, "unknown"))[:LONGEST] for name in ("python", "torch", "platform")
    )
    return f"Python {python}, torch {torch} ({platform})"

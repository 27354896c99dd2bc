"""What Docker sends to the build of the team's image, by infra/team/Dockerfile.dockerignore."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from tests.support.projects import REPOSITORY

RULES = (REPOSITORY / "infra" / "team" / "Dockerfile.dockerignore").read_text().splitlines()


def is_sent(path: str) -> bool:
    """Whether Docker sends a file to the build: the last rule that fits it, or a folder above it, decides."""
    places = [path, *(str(parent) for parent in PurePosixPath(path).parents if str(parent) != ".")]
    sent = True
    for line in RULES:
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = _pattern(rule.removeprefix("!"))
        if any(pattern.fullmatch(place) for place in places):
            sent = rule.startswith("!")
    return sent


def _pattern(rule: str) -> re.Pattern[str]:
    whole = re.escape(rule.strip("/")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.compile(whole)

"""docs/public-models.md says what is asked: every architecture of the table, with the versions that are pinned."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.public.architectures import ARCHITECTURES, BY_NAME
from tests.support.public.asking import PAGE, Answer

PINNED = dict(
    re.findall(
        r"^([\w.-]+)==(\S+)$", Path(PAGE.parent.parent, "tests/support/public/requirements.txt").read_text(), re.M
    )
)


def test_the_page_has_every_architecture_and_the_pinned_versions() -> None:
    text = PAGE.read_text()
    assert len(BY_NAME) == len(ARCHITECTURES) >= 20
    for item in ARCHITECTURES:
        assert f"| {item.name} | {item.library} |" in text, item.name
        # What became of its files.
        assert len(re.findall(rf"^\| {re.escape(item.name)}(?:, `[^|]+)? \|", text, re.M)) == 2, item.name
        version = {name.replace("_", "-"): value for name, value in PINNED.items()}[item.library.replace("_", "-")]
        assert f"{item.library} {version}" in text


def test_what_is_not_expected_is_a_mistake_and_so_is_what_is_missing() -> None:
    plain, refused, noted = BY_NAME["ViT"], BY_NAME["CLIP"], BY_NAME["wav2vec 2.0"]
    passes = Answer(
        status=0, text="", facts={"samples": "Answers do not depend on the other samples of a batch"}, notes=[]
    )
    assert passes.mistakes(plain) == [] and len(passes.mistakes(refused)) == 1 and len(passes.mistakes(noted)) == 1
    warns = Answer(status=0, text="", facts=passes.facts, notes=["forward decides what it calls (a line)"])
    assert warns.mistakes(noted) == [] and warns.mistakes(plain) == ["note: forward decides what it calls (a line)"]
    unasked = Answer(status=0, text="", facts={}, notes=[])
    assert unasked.mistakes(plain) == ["samples: nothing"]
    assert Answer(status=2, text="no", facts={}, notes=[]).mistakes(plain) == ["no"]

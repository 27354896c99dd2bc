"""docs/what-is-checked.md, written from the table by which the code says it.

python -m tests.support.what_is_checked > docs/what-is-checked.md
"""

from __future__ import annotations

from torchworker.situations import SITUATIONS

HEAD = """# What is checked

Proof that an artifact is its model says nothing of the job. These are the situations in which a job would go live
wrong without a word, or would fail when its training is over; what is asked of each, where it is first seen, and the
words that are said. `python -m tests.support.what_is_checked > docs/what-is-checked.md` writes this page from
[the table](../torchworker/situations.py) that the messages are made of.

| situation | what is asked | where | it says |
|---|---|---|---|
"""


def page() -> str:
    """The whole page, as markdown."""
    said = {one: f"… {one} …" if one.says else "nothing: they are not counted" for one in SITUATIONS}
    rows = [f"| {one.what} | {one.asked} | {one.where} | {said[one]} |\n" for one in SITUATIONS]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")

"""docs/what-is-checked.md: situations in which a job is wrong without failing, what is asked, where, and what it says.

    python -m tests.support.what_is_checked > docs/what-is-checked.md

A test looks for the words of each row in the file that the row names, so that the page says what the code says.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.support.projects import REPOSITORY

HEAD = """# What is checked

Proof that an artifact is its model says nothing of the job. These are the situations in which a job would go live
wrong without a word, or would fail when its training is over; what is asked of each, where it is first seen, and the
words that are said. `python -m tests.support.what_is_checked > docs/what-is-checked.md` writes this page from a table
whose words a test looks for in the code.

| situation | what is asked | where | it says |
|---|---|---|---|
"""


class Row(NamedTuple):
    """One situation."""

    situation: str
    asked: str
    where: str
    """Stages and commands in which it is seen, the first one first."""
    says: str
    """Words as they stand in the file."""
    file: str


CHECK, TRAIN, EXPORT, GATES, MOVE = (
    "check",
    "start of training",
    "before the export",
    "gates",
    "before the pointer moves",
)
ROWS = (
    Row("held-out data is training data", "inputs of all samples, by hash", f"{CHECK}, beside training",
        "are training samples, bit by bit", "registry/data/checks.py"),
    Row("a stream divides itself among the ranks", "the first sample of the stream in each rank", TRAIN,
        "divides itself among the ranks", "torchworker/data/loading.py"),
    Row("a stream draws from generators of its own", "the same, twice", TRAIN,
        "the stream begins with another sample each time that it is read", "torchworker/data/loading.py"),
    Row("DataLoader workers share a file; data changed meanwhile", "counts and fingerprints of each reading",
        EXPORT, "have not read the same", "registry/data/readings.py"),
    Row("gates see other samples than the epoch did", "each metric of the epoch that ships against the gates'", GATES,
        "expected a difference of at most", "registry/agreement.py"),
    Row("outputs [N, 1] against targets [N]", "whether it matters which target belongs to which output",
        f"{CHECK}, {TRAIN}", "compares each output with the target of every sample", "torchworker/project/pairing.py"),
    Row("padding counted as wrong answers", "labels that are no class, and classes that the loss ignores", TRAIN,
        "is padding, as torch's losses ignore -100", "torchworker/project/metrics.py"),
    Row("a loss that is no mean over samples, in parts", "the loss of a batch against its halves",
        f"{CHECK}, first step",
        "of a batch is not the mean of those of its halves", "torchworker/training/weighting.py"),
    Row("answers depend on the other samples of a batch", "samples alone, in another order, among others",
        f"{CHECK}, {TRAIN}, {EXPORT}", "the answer to a sample depends on the other samples of its batch",
        "torchworker/project/independence.py"),
    Row("another kind of release than what is live", "signature, labels, formats, model, live score, runtime", MOVE,
        "release.allow", "registry/kind.py"),
    Row("an error that comes back", "the same exception at the same place twice", "training",
        "so another try would not help", "torchworker/contract.py"),
    Row("a model that cannot pass its gates", "limits of gates against the epoch that ships", EXPORT,
        "gates failed before the export", "registry/agreement.py"),
    Row("randomness or dropout in eval mode", "the same batch twice", f"{CHECK}, {TRAIN}",
        "dropout is on there", "torchworker/project/shippable.py"),
    Row("an output that cannot be shipped", "its dimensions, dtype and name, for each format", f"{CHECK}, {TRAIN}",
        "leave {kind} out of export.formats", "torchworker/project/shippable.py"),
    Row("a model that a format cannot capture", "the untrained model, in every format, in the clean room",
        f"{CHECK}, beside a long training",
        "of the untrained model", "tasks/trial.py"),
    Row("a last batch of one sample", "whether the model can be trained on one", f"{CHECK}, {TRAIN}",
        "it is joined to the batch before it", "torchworker/data/loading.py"),
    Row("parameters that some steps do not use", "decisions in forward, and what the other answer would use",
        f"{CHECK}, {TRAIN}", "set train.find_unused_parameters: true", "torchworker/training/strategy.py"),
    Row("a file beside the code that the model reads", "files that the factory opened, by content", "decide",
        "added", "registry/made_of.py"),
    Row("a snapshot that was altered at its size", "content of every file, remembered by inode and times",
        "decide, begin", "the data is not what its manifest says", "registry/data/snapshots.py"),
    Row("a person has stopped the run", "its state in Prefect, at every stage and before the pointer moves", MOVE,
        "before anything went live", "tasks/stopping.py"),
    Row("a key that stands twice in a job file", "the keys of each mapping", "check, run", "given twice",
        "registry/job/load.py"),
)  # fmt: skip


def page() -> str:
    """The whole page, as markdown."""
    return HEAD + "".join(f"| {row.situation} | {row.asked} | {row.where} | … {row.says} … |\n" for row in ROWS)


def words(file: str) -> str:
    """The text of a file in which a sentence is not broken by quotation marks and lines."""
    text = (REPOSITORY / file).read_text()
    text = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)
    return re.sub(r"\s+", " ", text)


if __name__ == "__main__":
    print(page(), end="")

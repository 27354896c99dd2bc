"""Situations in which a job is wrong without failing: what is asked of each, where, and the words that are said of it.

The code says these words by naming the situation, and docs/what-is-checked.md is written from the same table. It is
imported by both sides of a stage, and imports nothing of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

CHECK, TRAIN, EXPORT, GATES, MOVE = (
    "check",
    "start of training",
    "before the export",
    "gates",
    "before the pointer moves",
)


@dataclass(frozen=True)
class Situation:
    """One of them. Its text is what is said of it, inside a message."""

    what: str
    asked: str
    where: str
    """Stages and commands in which it is seen, the first one first."""
    says: str
    """Empty where nothing has to be said, as it is done right."""

    def __str__(self) -> str:
        return self.says


HELD_OUT_IS_TRAINING = Situation(
    "held-out data is training data", "inputs of all samples, by hash", f"{CHECK}, beside training",
    "are training samples, bit by bit",
)  # fmt: skip
DIVIDED_STREAM = Situation(
    "a stream divides itself among the ranks", "the first sample of the stream in each rank", TRAIN,
    "divides itself among the ranks",
)  # fmt: skip
DRAWN_STREAM = Situation(
    "a stream draws from generators of its own", "the same, twice", TRAIN,
    "the stream begins with another sample each time that it is read",
)  # fmt: skip
OTHER_READING = Situation(
    "DataLoader workers share a file; data changed meanwhile", "counts and fingerprints of each reading", EXPORT,
    "have not read the same",
)  # fmt: skip
OTHER_NUMBERS = Situation(
    "gates see other samples than the epoch did", "each metric of the epoch that ships against the gates'", GATES,
    "expected a difference of at most",
)  # fmt: skip
BROADCAST = Situation(
    "outputs [N, 1] against targets [N]", "whether it matters which target belongs to which output",
    f"{CHECK}, {TRAIN}", "compares each output with the target of every sample",
)  # fmt: skip
PADDING = Situation(
    "padding counted as wrong answers", "labels that are no class, and classes that the loss ignores", TRAIN, "",
)  # fmt: skip
NO_MEAN = Situation(
    "a loss that is no mean over samples, in parts", "the loss of a batch against its halves", f"{CHECK}, first step",
    "of a batch is not the mean of those of its halves",
)  # fmt: skip
COUPLED = Situation(
    "answers depend on the other samples of a batch", "samples alone, in another order, among others",
    f"{CHECK}, {TRAIN}, {EXPORT}", "the answer to a sample depends on the other samples of its batch",
)  # fmt: skip
OTHER_KIND = Situation(
    "another kind of release than what is live", "signature, labels, formats, model, live score, runtime", MOVE,
    "of another kind than the live release",
)  # fmt: skip
COMES_BACK = Situation(
    "an error that comes back", "the same exception at the same place twice", "training",
    "so another try would not help",
)  # fmt: skip
CANNOT_PASS = Situation(
    "a model that cannot pass its gates", "limits of gates against the epoch that ships", EXPORT,
    "gates failed before the export",
)  # fmt: skip
DROPOUT = Situation(
    "randomness or dropout in eval mode", "the same batch twice", f"{CHECK}, {TRAIN}", "dropout is on there",
)  # fmt: skip
KEPT_STATE = Situation(
    "a model that changes itself when it is asked", "parameters and buffers before and after, bit by bit",
    f"{CHECK}, {TRAIN}, {EXPORT}", "an exported model must not keep state between calls",
)  # fmt: skip
NOT_SHIPPABLE = Situation(
    "an output that cannot be shipped", "its dimensions, dtype and name, for each format", f"{CHECK}, {TRAIN}",
    "out of export.formats",
)  # fmt: skip
NOT_CAPTURED = Situation(
    "a model that a format cannot capture", "the untrained model, in every format, in the clean room",
    f"{CHECK}, beside a long training", "of the untrained model",
)  # fmt: skip
BATCH_OF_ONE = Situation(
    "a last batch of one sample", "whether the model can be trained on one", f"{CHECK}, {TRAIN}",
    "it is joined to the batch before it",
)  # fmt: skip
UNUSED_PARAMETERS = Situation(
    "parameters that some steps do not use", "decisions in forward, and what the other answer would use",
    f"{CHECK}, {TRAIN}", "set train.find_unused_parameters: true",
)  # fmt: skip
READ_BY_THE_MODEL = Situation(
    "a file beside the code that the model reads", "files that the factory opened, by content", "decide", "added",
)  # fmt: skip
ALTERED_SNAPSHOT = Situation(
    "a snapshot that was altered at its size", "content of every file, remembered by inode and times",
    "decide, begin", "the data is not what its manifest says",
)  # fmt: skip
STOPPED = Situation(
    "a person has stopped the run", "its state in Prefect, at every stage and before the pointer moves", MOVE,
    "before anything went live",
)  # fmt: skip
GIVEN_TWICE = Situation(
    "a key that stands twice in a job file", "the keys of each mapping", "check, run", "given twice",
)  # fmt: skip

SITUATIONS = tuple(value for value in globals().values() if isinstance(value, Situation))

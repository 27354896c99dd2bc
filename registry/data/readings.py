"""What each process of a run has read of the data, held against each other. No store, no network.

The release records the data that inspection saw. Where training or the gates saw other samples, every number about them
is about something else, and nobody would notice: each process is right about what it has read itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torchworker import situations
from torchworker.contract import ExportResult, InspectResult, Reading, RereadResult, SplitFacts, TrainResult
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.job.job import Job

INSPECTION, TRAINING, GATES = "inspection", "training", "the export, for the gates"


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """Two processes that have read a split differently."""

    split: str
    """`train` or `validation`."""
    inspected: Reading
    other: Reading
    who: str
    """TRAINING or GATES."""

    @property
    def counted(self) -> bool:
        """Whether they differ in the number of samples already."""
        return self.inspected.samples != self.other.samples


def contradictions_of_training(job: Job, facts: InspectResult, trained: TrainResult) -> list[Contradiction]:
    """Splits of which inspection and the ranks have read something else. Result of before: what was not told agrees."""
    found: list[Contradiction] = []
    for split, inspected in (("train", facts.train), ("validation", facts.validation)):
        read = trained.read.get(split)
        repeatable = not inspected.varies or (split == "train" and _seeded(job))
        if read is not None:
            found += _compared(split, inspected, read, TRAINING, repeatable)
    return found


def contradictions_of_gates(job: Job, facts: InspectResult, exported: ExportResult) -> list[Contradiction]:
    """The same of the validation samples that gates look at."""
    read, inspected = exported.validation, facts.validation
    if read is None or (facts.drawn is None and inspected.samples > job.export.validation_samples):
        # Of before, when the first were taken.
        return []
    if facts.drawn is not None:
        # Of some samples there is no fingerprint to hold theirs against.
        known = Reading(samples=len(facts.drawn), fingerprint=read.fingerprint)
        wrong = Contradiction(split="validation", inspected=known, other=read, who=GATES)
        return [wrong] if wrong.counted else []
    return list(_compared("validation", inspected, read, GATES, not inspected.varies))


def _seeded(job: Job) -> bool:
    """Whether a sample's random draws depend on its place alone, in inspection as in training."""
    return job.train.data_workers > 0 and job.train.entrypoint is None


def _compared(split: str, inspected: SplitFacts, read: Reading, who: str, repeatable: bool) -> Iterator[Contradiction]:
    known = Reading(samples=inspected.samples, fingerprint=inspected.fingerprint)
    found = Contradiction(split=split, inspected=known, other=read, who=who)
    if found.counted or (repeatable and known.fingerprint != read.fingerprint):
        yield found


def refusal(job: Job, found: Contradiction, again: RereadResult | None) -> GateError:
    """Why the run cannot go on.

    Args:
        job: whose data it is.
        found: what contradicts each other.
        again: the split read once more; None where the counts say enough.
    """
    kind = "training" if found.split == "train" else "validation"
    one, other = found.inspected, found.other
    head = f"{job.data.factory}: {INSPECTION} and {found.who} {situations.OTHER_READING} {kind} samples"
    if found.counted:
        said = f"{one.samples:,} in {INSPECTION}, {other.samples:,} in {found.who}"
        why = (
            "A stream that divides itself among the ranks would do it (by torch.distributed.get_rank(), RANK or a "
            "library's split by node): return the whole stream, the ranks take turns through it, or say data.sharded: "
            "true. So would data that changed while the run was at work: data.snapshot holds it still"
        )
    else:
        said = (
            f"{one.samples:,} each, with fingerprint {one.fingerprint[:8]} in {INSPECTION} and "
            f"{other.fingerprint[:8]} in {found.who}"
        )
        if again is not None and again.read is not None:
            like = [
                name
                for name, read in ((INSPECTION, one), (found.who, other))
                if again.read.fingerprint == read.fingerprint
            ]
            said += f"; read again by one process, twice alike, it is as in {like[0] if like else 'neither'}"
        why = _why(job)
    return GateError(f"{head}: {said}. {why}. Nothing was registered or promoted")


def _why(job: Job) -> str:
    train = job.train
    if train.data_workers:
        return (
            f"With train.data_workers: {train.data_workers}, a file or a connection that the dataset opens in its "
            "constructor is shared by all workers, which move each other's place in it: open it where a sample is "
            "read, once a process. So would data that changed while the run was at work: data.snapshot holds it still"
        )
    return (
        "Samples that depend on the process that reads them (its rank, its place in the machine) would do it, and data "
        "that changed while the run was at work: data.snapshot holds it still"
    )

"""What the job asks of its data, held against what the data is like. No store, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchworker import situations
from torchworker.contract import InspectResult, SplitFacts, TensorFacts
from train_and_ship.infra.errors import GateError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.data.drift import Bins, Shift, bins_of_columns, bins_of_labels, ks, most_frequent, psi
from train_and_ship.registry.job.data import Checks, Drift, TensorCheck
from train_and_ship.registry.text import Table, number, passed_or_failed

SPLITS = ("train", "validation")
TARGET = "target"
MOST_SHARED = 0.5
"""Part of the validation samples that may be training samples where the job gives no limit of its own."""
MOST_ROWS, MOST_GONE = 200, 100
"""Of a table of findings; of tensors that the live release has and the data lacks, the others are counted."""
LABELS = 20
"""Most labels that are drawn: the most frequent ones."""
LONGEST_NAME, LONGEST_TEXT = 60, 200
"""Characters of a label, and of what else the live release says of its data."""
DRAWN = 6
"""Columns whose distributions are drawn: those that moved most."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was asked of the data."""

    check: str
    """`schema`, `missing`, `outside`, `labels`, `overlap`, `repeated`, `samples`, `shrinks`, `psi` or `ks`."""
    where: str
    """Split, tensor or column."""
    measured: str
    limit: str
    passed: bool

    @property
    def drift(self) -> bool:
        """Whether it is asked of every column, and is told only when it failed."""
        return self.check in ("psi", "ks")


def findings_table(findings: Sequence[Finding]) -> Table:
    """A row for each thing that was asked, up to MOST_ROWS."""
    rows = [
        (item.check, item.where, item.measured, item.limit, passed_or_failed(item.passed))
        for item in findings[:MOST_ROWS]
    ]
    more = len(findings) - MOST_ROWS
    notes = [f"and {more:,} more, which data_checks.json of the run has"] if more > 0 else []
    return Table(header=("check", "where", "measured", "limit", "verdict"), rows=rows, notes=notes)


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """One column beside the live release's."""

    column: str
    bins: Bins
    psi: Shift
    ks: Shift | None
    """None for labels, which have no order."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was asked, and how the distributions lie beside those of the live release."""

    findings: Sequence[Finding]
    distributions: Sequence[Distribution]
    """The column that moved most comes first; empty when nothing is live, or drift is not asked for."""
    live: str
    """The release whose data this is held against; empty when there is none that tells."""

    @property
    def failed(self) -> list[Finding]:
        """What was found and is against the job's word."""
        return [finding for finding in self.findings if not finding.passed]


def shared_samples(overlap: int, held: int) -> str:
    """What there is to say of validation samples that are training samples; empty when there are none.

    Args:
        overlap: How many are.
        held: Of how many.
    """
    if not overlap:
        return ""
    return f"{overlap:,} of {held:,} validation samples ({overlap / held:.1%}) {situations.HELD_OUT_IS_TRAINING}"


def groups_in_both(facts: InspectResult) -> str:
    """In words, how many groups of samples (data.group) are in training and validation; empty when none is."""
    if not facts.shared_groups:
        return ""
    return (
        f"{facts.shared_groups:,} of {facts.groups:,} groups of validation samples (data.group) have training samples "
        "too: what is measured says how good the model is on groups that it knows, not on new ones"
    )


def require_held_out(checks: Checks | None, overlap: int, held: int) -> None:
    """Ask that most of the held-out data is no training data, where the job has no checks, which limit it.

    Args:
        checks: Of the job.
        overlap: Validation samples that are training samples.
        held: Of how many.

    Raises:
        GateError: It is.
    """
    if checks is None and overlap > MOST_SHARED * held:
        raise GateError(
            f"{shared_samples(overlap, held)}: no number that is measured on them says how good the model is on "
            'anything new. data.factory gets "train" or "validation" and has to answer with different samples; where '
            "they are meant to be the same, say so: data.checks: {overlap: 1.0}"
        )


def check_data(checks: Checks, facts: InspectResult, live_facts: InspectResult | None, live: str) -> Report:
    """Ask everything.

    Args:
        checks: What is asked.
        facts: What the data is like.
        live_facts: The same of the live release; None when there is none that tells.
        live: Its id; empty when there is none.

    Raises:
        GateError: The checks name a tensor that the data does not have.
    """
    known = facts.train.tensors
    unknown = [name for name in checks.tensors if name not in known]
    if unknown:
        raise GateError(f"data.checks.tensors: expected {', '.join(known)}; got {', '.join(unknown)}")
    distributions: list[Distribution] = []
    splits = zip(SPLITS, (facts.train, facts.validation), strict=True)
    findings = [finding for name, split in splits for finding in _of_split(checks, name, split)]
    findings += _of_both(checks, facts)
    if live_facts is not None:
        findings += _against(checks, facts, live_facts)
        if checks.drift is not None:
            distributions = _distributions(facts.train, live_facts.train)
            findings += _drift(checks.drift, distributions)
    distributions.sort(key=lambda item: -item.psi.value)
    return Report(findings=findings, distributions=distributions, live=live if live_facts is not None else "")


def require_good_data(name: str, report: Report) -> None:
    """Raises GateError with what failed."""
    failed = report.failed
    if failed:
        said = "; ".join(f"{item.check} of {item.where}: {item.measured}, expected {item.limit}" for item in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise GateError(
            f"{name}: the data is not what data.checks asks for: {said}{more}. Nothing was trained. Mend the data, or "
            "change data.checks if this is how it is from now on",
            findings_table(failed).text(),
        )


# ---- one split


def _of_split(checks: Checks, split: str, facts: SplitFacts) -> Iterator[Finding]:
    for name, tensor in facts.tensors.items():
        where = f"{split} {name}"
        asked = checks.tensors.get(name, TensorCheck())
        yield from _schema(asked, where, tensor)
        yield _share("missing", where, tensor.missing, tensor.values, checks.missing)
        if asked.min is not None or asked.max is not None:
            found = _share("outside", where, tensor.outside, tensor.values, checks.outside)
            span = f"{number(tensor.low)} to {number(tensor.high)}"
            yield Finding(
                check=found.check, where=where, measured=f"{found.measured}; values {span}",
                limit=f"{found.limit} outside {_range(asked)}", passed=found.passed,
            )  # fmt: skip
    yield from _labels(checks, split, facts)
    yield _share("repeated", split, facts.repeated, facts.samples, checks.repeated)


def _schema(asked: TensorCheck, where: str, tensor: TensorFacts) -> Iterator[Finding]:
    if asked.dtype is not None:
        passed = tensor.dtype == asked.dtype
        yield Finding(check="schema", where=where, measured=tensor.dtype, limit=asked.dtype, passed=passed)
    if asked.shape is not None:
        shapes = [list(shape) for shape in tensor.shapes]
        passed = all(
            len(shape) == len(asked.shape)
            and all(want is None or got == want for got, want in zip(shape, asked.shape, strict=True))
            for shape in shapes
        )
        said = " and ".join(str(shape) for shape in shapes)
        yield Finding(check="schema", where=where, measured=said, limit=str(list(asked.shape)), passed=passed)


def _range(asked: TensorCheck) -> str:
    low = "−∞" if asked.min is None else f"{asked.min:g}"
    high = "∞" if asked.max is None else f"{asked.max:g}"
    return f"{low} to {high}"


def _share(check: str, where: str, count: int, total: int, limit: float) -> Finding:
    share = count / total if total else 0.0
    measured = f"{count:,} of {total:,} ({share:.2%})"
    return Finding(check=check, where=where, measured=measured, limit=f"at most {limit:.2%}", passed=share <= limit)


def _labels(checks: Checks, split: str, facts: SplitFacts) -> Iterator[Finding]:
    asked, labels = checks.labels, facts.labels
    where = f"{split} {TARGET}"
    if (asked.allowed is not None or asked.min_share > 0) and not labels:
        yield Finding(
            check="labels", where=where, measured="no labels", limit="one whole number a sample", passed=False
        )
        return
    if asked.allowed is not None:
        allowed = set(asked.allowed)
        strange = [label for label in labels if int(label) not in allowed]
        said = f"{', '.join(strange[:10])} too" if strange else f"{len(labels)} labels"
        limit = f"only {', '.join(map(str, asked.allowed))}"
        yield Finding(check="labels", where=where, measured=said, limit=limit, passed=not strange)
    if asked.min_share > 0:
        total = sum(labels.values())
        names = [str(label) for label in asked.allowed] if asked.allowed is not None else list(labels)
        shares = {name: labels.get(name, 0) / total for name in names}
        rarest = min(shares, key=lambda name: shares[name])
        yield Finding(
            check="labels", where=where, measured=f"label {rarest} in {shares[rarest]:.2%} of the samples",
            limit=f"at least {asked.min_share:.2%} each", passed=shares[rarest] >= asked.min_share,
        )  # fmt: skip


# ---- both splits, and the live release's data


def _of_both(checks: Checks, facts: InspectResult) -> Iterator[Finding]:
    held = facts.validation.samples
    yield _share("overlap", "validation samples in the training data", facts.overlap, held, checks.overlap)
    samples = facts.train.samples
    yield Finding(
        check="samples", where="train", measured=f"{samples:,}", limit=f"at least {checks.samples:,}",
        passed=samples >= checks.samples,
    )  # fmt: skip


def _against(checks: Checks, facts: InspectResult, live: InspectResult) -> Iterator[Finding]:
    if checks.shrinks is not None:
        before, now = live.train.samples, facts.train.samples
        yield _share("shrinks", "train, against the live release", max(0, before - now), before, checks.shrinks)
    if checks.drift is None:
        return
    gone = [name for name in live.train.tensors if name not in facts.train.tensors]
    left_out = set(gone[MOST_GONE:])
    for name in dict.fromkeys([*live.train.tensors, *facts.train.tensors]):
        if name in left_out:
            continue
        was, measured = (_form(side.train.tensors.get(name)) for side in (live, facts))
        where = f"train {on_one_line(name, LONGEST_TEXT)}, against the live release"
        yield Finding(
            check="schema", where=where, measured=on_one_line(measured, LONGEST_TEXT),
            limit=on_one_line(was, LONGEST_TEXT), passed=was == measured,
        )  # fmt: skip
    if (more := len(gone) - MOST_GONE) > 0:
        where = f"train, {more:,} more tensors of the live release"
        yield Finding(check="schema", where=where, measured="none", limit="there", passed=False)


def _form(tensor: TensorFacts | None) -> str:
    """A tensor's dtype and rank: sizes may differ where a dimension is dynamic."""
    if tensor is None:
        return "none"
    ranks = sorted({len(shape) for shape in tensor.shapes})
    return f"{tensor.dtype}, {' or '.join(map(str, ranks))} dimensions"


def _distributions(now: SplitFacts, before: SplitFacts) -> list[Distribution]:
    found = []
    for name, column in now.columns.items():
        earlier = before.columns.get(name)
        if earlier is None or not earlier.values or not column.values:
            continue
        bins = bins_of_columns(earlier.quantiles, column.quantiles)
        sizes = (earlier.values, column.values)
        distance = ks(earlier.quantiles, column.quantiles, *sizes)
        found.append(Distribution(column=name, bins=bins, psi=psi(bins, *sizes), ks=distance))
    if sum(now.labels.values()) and sum(before.labels.values()):
        bins = bins_of_labels(before.labels, now.labels)
        # Labels are counted, not estimated: an empty one is half a sample.
        sizes = (before.samples, now.samples)
        distance = psi(bins, *sizes, least=0.5 / max(sizes))
        shown = most_frequent(bins, LABELS, LONGEST_NAME)
        found.append(Distribution(column=TARGET, bins=shown, psi=distance, ks=None))
    return found


def _drift(asked: Drift, distributions: Sequence[Distribution]) -> Iterator[Finding]:
    ignored = set(asked.ignore)
    for item in distributions:
        if item.column in ignored:
            continue
        for check, shift, limit in (("psi", item.psi, asked.psi), ("ks", item.ks, asked.ks)):
            if shift is not None and limit is not None:
                chance = f"; {shift.chance:.3g} may be chance" if shift.chance > limit else ""
                yield Finding(
                    check=check, where=item.column, measured=f"{shift.value:.3g}{chance}", limit=f"at most {limit:g}",
                    passed=not shift.beyond(limit),
                )  # fmt: skip

"""What the job asks of its data, held against what the data is like. No store, no network.

`Facts` is what a worker found out (`torchworker.contract.InspectResult`) as plain values, and also what a release keeps
in its data.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train_and_ship.infra.errors import GateError
from train_and_ship.registry.data.drift import Bins, Shift, bins_of_columns, bins_of_labels, ks, psi
from train_and_ship.registry.job.data import Checks, Drift, TensorCheck
from train_and_ship.registry.text import number, table, text_table

Facts = Mapping[str, Any]
SPLITS = ("train", "validation")
TARGET = "target"
DRAWN = 6
"""Columns whose distributions are drawn: those that moved most."""
BAR = 24
"""Characters of a share of 1."""


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

    def row(self) -> tuple[str, ...]:
        return (self.check, self.where, self.measured, self.limit, "passed" if self.passed else "FAILED")


HEADER = ("check", "where", "measured", "limit", "verdict")


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
        return [finding for finding in self.findings if not finding.passed]


NOTHING_ASKED = Report(findings=(), distributions=(), live="")


def check_data(checks: Checks, facts: Facts, live_facts: Facts | None, live: str) -> Report:
    """Ask everything. live_facts: the live release's data.json; None when there is none.

    Raises GateError for checks that name a tensor that the data does not have.
    """
    known = facts["train"]["tensors"]
    unknown = [name for name in checks.tensors if name not in known]
    if unknown:
        raise GateError(f"data.checks.tensors: expected {', '.join(known)}; got {', '.join(unknown)}")
    distributions: list[Distribution] = []
    findings = [finding for split in SPLITS for finding in _of_split(checks, split, facts[split])]
    findings += _of_both(checks, facts)
    if live_facts is not None:
        findings += _against(checks, facts, live_facts)
        if checks.drift is not None:
            distributions = _distributions(facts["train"], live_facts["train"])
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
            text_table(HEADER, [item.row() for item in failed]),
        )


# ---- one split


def _of_split(checks: Checks, split: str, facts: Facts) -> Iterator[Finding]:
    for name, tensor in facts["tensors"].items():
        where = f"{split} {name}"
        asked = checks.tensors.get(name, TensorCheck())
        yield from _schema(asked, where, tensor)
        yield _share("missing", where, tensor["missing"], tensor["values"], checks.missing)
        if asked.min is not None or asked.max is not None:
            found = _share("outside", where, tensor["outside"], tensor["values"], checks.outside)
            span = f"{number(tensor['low'])} to {number(tensor['high'])}"
            yield Finding(
                check=found.check, where=where, measured=f"{found.measured}; values {span}",
                limit=f"{found.limit} outside {_range(asked)}", passed=found.passed,
            )  # fmt: skip
    yield from _labels(checks, split, facts)
    yield _share("repeated", split, facts["repeated"], facts["samples"], checks.repeated)


def _schema(asked: TensorCheck, where: str, tensor: Facts) -> Iterator[Finding]:
    if asked.dtype is not None:
        passed = tensor["dtype"] == asked.dtype
        yield Finding(check="schema", where=where, measured=tensor["dtype"], limit=asked.dtype, passed=passed)
    if asked.shape is not None:
        shapes = [list(shape) for shape in tensor["shapes"]]
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


def _labels(checks: Checks, split: str, facts: Facts) -> Iterator[Finding]:
    asked, labels = checks.labels, facts["labels"]
    where = f"{split} {TARGET}"
    if (asked.allowed is not None or asked.min_share > 0) and not labels:
        yield Finding(
            check="labels", where=where, measured="no labels", limit="one whole number a sample", passed=False
        )
        return
    if asked.allowed is not None:
        strange = [label for label in labels if int(label) not in asked.allowed]
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


def _of_both(checks: Checks, facts: Facts) -> Iterator[Finding]:
    held = facts["validation"]["samples"]
    yield _share("overlap", "validation samples in the training data", facts["overlap"], held, checks.overlap)
    samples = facts["train"]["samples"]
    yield Finding(
        check="samples", where="train", measured=f"{samples:,}", limit=f"at least {checks.samples:,}",
        passed=samples >= checks.samples,
    )  # fmt: skip


def _against(checks: Checks, facts: Facts, live: Facts) -> Iterator[Finding]:
    if checks.shrinks is not None:
        before, now = live["train"]["samples"], facts["train"]["samples"]
        yield _share("shrinks", "train, against the live release", max(0, before - now), before, checks.shrinks)
    if checks.drift is None:
        return
    for name in dict.fromkeys([*live["train"]["tensors"], *facts["train"]["tensors"]]):
        before, now = (_form(side["train"]["tensors"].get(name)) for side in (live, facts))
        yield Finding(
            check="schema", where=f"train {name}, against the live release", measured=now, limit=before,
            passed=before == now,
        )  # fmt: skip


def _form(tensor: Facts | None) -> str:
    """A tensor's dtype and rank: sizes may differ where a dimension is dynamic."""
    if tensor is None:
        return "none"
    ranks = sorted({len(shape) for shape in tensor["shapes"]})
    return f"{tensor['dtype']}, {' or '.join(map(str, ranks))} dimensions"


def _distributions(now: Facts, before: Facts) -> list[Distribution]:
    found = []
    for name, column in now["columns"].items():
        earlier = before["columns"].get(name)
        if earlier is None or not earlier["values"] or not column["values"]:
            continue
        bins = bins_of_columns(earlier["quantiles"], column["quantiles"])
        sizes = (earlier["values"], column["values"])
        distance = ks(earlier["quantiles"], column["quantiles"], *sizes)
        found.append(Distribution(column=name, bins=bins, psi=psi(bins, *sizes), ks=distance))
    if now["labels"] and before["labels"]:
        bins = bins_of_labels(before["labels"], now["labels"])
        # Labels are counted, not estimated: an empty one is half a sample.
        sizes = (before["samples"], now["samples"])
        found.append(Distribution(column=TARGET, bins=bins, psi=psi(bins, *sizes, least=0.5 / max(sizes)), ks=None))
    return found


def _drift(asked: Drift, distributions: Sequence[Distribution]) -> Iterator[Finding]:
    for item in distributions:
        if item.column in asked.ignore:
            continue
        for check, shift, limit in (("psi", item.psi, asked.psi), ("ks", item.ks, asked.ks)):
            if shift is not None and limit is not None:
                chance = f"; {shift.chance:.3g} may be chance" if shift.chance > limit else ""
                yield Finding(
                    check=check, where=item.column, measured=f"{shift.value:.3g}{chance}", limit=f"at most {limit:g}",
                    passed=not shift.beyond(limit),
                )  # fmt: skip


# ---- in words


def render_data(report: Report, facts: Facts) -> str:
    """The data and its checks as markdown: facts, failures first, and distributions beside the live release's."""
    splits = [
        (split, f"{facts[split]['samples']:,}", f"`{facts[split]['fingerprint']}`", f"{facts[split]['repeated']:,}")
        for split in SPLITS
    ]
    parts = [table(("split", "samples", "fingerprint", "repeated"), splits)]
    passed = [item for item in report.findings if item.passed]
    shown = [*report.failed, *[item for item in passed if item.check not in ("psi", "ks")]]
    if shown:
        parts.append(table(HEADER, [item.row() for item in shown]))
    still = len([item for item in passed if item.check in ("psi", "ks")])
    if still:
        parts.append(f"{still} statistics of drift passed.")
    if report.distributions:
        parts.append(f"### Beside the data of the live release `{report.live}`")
        parts += [_drawn(item) for item in report.distributions[:DRAWN]]
    if len(report.distributions) > DRAWN:
        rest = report.distributions[DRAWN:]
        parts.append(f"{len(rest)} more columns moved less: psi at most {rest[0].psi.value:.3g}.")
    return "\n\n".join(parts)


def _drawn(item: Distribution) -> str:
    distance = f", ks {item.ks.value:.3g}" if item.ks is not None else ""
    rows = [
        (name, f"{before:.1%}", f"{now:.1%}", f"`{_bar(before)}` `{_bar(now)}`")
        for name, before, now in zip(item.bins.names, item.bins.before, item.bins.now, strict=True)
    ]
    title = f"**{item.column}**: psi {item.psi.value:.3g}{distance}"
    return f"{title}\n\n{table(('values', 'live', 'now', 'live, now'), rows)}"


def _bar(share: float) -> str:
    return ("█" * round(share * BAR)).ljust(BAR, "░")

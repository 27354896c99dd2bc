"""What kind of thing a release is, by what it records, and what is of another kind in the next one. No store.

What a release does not record, because another version made it or because nobody could tell, is unknown, and what is
unknown differs from nothing.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from train_and_ship.infra.errors import GateError, RequestError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.release.documents import MOST_COUNT, told_samples
from train_and_ship.registry.release.manifest import DATA, JOB, LINEAGE, VERDICTS, Manifest
from train_and_ship.registry.text import Cell, Mark, Table

SIGNATURE, LABELS, FORMATS = "signature", "labels", "formats"
MODEL, LIVE_SCORE, RUNTIME = "model", "live_score", "runtime"
KINDS = (SIGNATURE, LABELS, FORMATS, MODEL, LIVE_SCORE, RUNTIME)
"""What a release can differ in, as `release.allow` of a job and `--allow` name it."""
REFERENCES = ("model", "data")
"""Parts of a job whose `factory` says which model it is. What is in these files may change as it likes."""
BY_CHANCE = 10
"""A class that one data set has and the other lacks counts when the other would hold about so many samples of it: that
it holds none by chance has a probability of e^-10."""
NONE = "none"
LONGEST_TEXT, MOST_TEXTS, MOST_ROWS = 200, 20, 100
"""Characters that are shown of one value, how many differences of a kind, and rows of a table."""
BATCH_AXIS = 0


@dataclass(frozen=True, kw_only=True)
class KindChange:
    """One thing that makes a release another kind of thing than the one that is live."""

    kind: str
    """One of KINDS."""
    of: str
    """What it is about: `input x`, `format onnx`."""
    live: str
    candidate: str
    """What stands in its place."""

    def __str__(self) -> str:
        return f"{_short(self.of)}: {_short(self.live)} → {_short(self.candidate)}"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a release records of what it is. Empty where it records nothing."""

    signature: Mapping[str, Any] = field(default_factory=dict)
    """As in its manifest."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Format to file."""
    classes: Sequence[str] = ()
    """Names of its classes, in the order of its outputs, as its data has them."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Whole-number target to how many it was trained on."""
    model: Mapping[str, str] = field(default_factory=dict)
    """`model.factory`, `data.factory`, `export.serving`, `repository`, `project folder`."""
    onnx: Mapping[str, int] = field(default_factory=dict)
    """`opset` and `IR version` of its ONNX artifact."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0
    """How many it was measured on."""

    @classmethod
    def of(cls, manifest: Manifest, document: Callable[[str], Mapping[str, Any]]) -> Self:
        """What a release says of itself.

        Args:
            manifest: of the release.
            document: one of its JSON files; an empty one where it has none.
        """
        job, lineage, data = document(JOB), document(LINEAGE), document(DATA)
        model = {f"{part}.factory": _mapping(job, part).get("factory") for part in REFERENCES}
        if _mapping(job, "export"):
            model["export.serving"] = _mapping(job, "export").get("serving", NONE)
        place = _mapping(lineage, "project")
        model |= {"repository": place.get("repository"), "project folder": place.get("folder")}
        classes = data.get("classes")
        # Whoever made the release wrote these: what has another shape, or cannot be, tells nothing.
        samples = 0
        with contextlib.suppress(ValueError):
            samples = told_samples(document(VERDICTS))
        return cls(
            signature=manifest.signature,
            formats=manifest.formats,
            classes=classes if isinstance(classes, list) and all(isinstance(one, str) for one in classes) else (),
            labels=_counts(_mapping(_mapping(data, "train"), "labels"), _LABEL),
            model={name: said for name, said in model.items() if isinstance(said, str) and said},
            onnx=_counts(_mapping(lineage, "onnx")),
            metrics=manifest.metrics,
            samples=samples,
        )


def changes_in_kind(live: Kind, candidate: Kind) -> list[KindChange]:
    """What makes the candidate another kind of thing, by KINDS; `live_score` is not a matter of records alone."""
    return [
        *_signature(live.signature, candidate.signature),
        *_labels(live, candidate),
        *(
            KindChange(kind=FORMATS, of=f"format {kind}", live=live.formats[kind], candidate=NONE)
            for kind in live.formats
            if kind not in candidate.formats
        ),
        *(
            KindChange(kind=MODEL, of=name, live=said, candidate=candidate.model[name])
            for name, said in live.model.items()
            if candidate.model.get(name, said) != said
        ),
        *(
            KindChange(kind=RUNTIME, of=f"ONNX {name}", live=str(version), candidate=str(candidate.onnx[name]))
            for name, version in live.onnx.items()
            if candidate.onnx.get(name, version) > version
        ),
    ]


def require_kinds(names: Sequence[str]) -> None:
    """Raises RequestError unless all are in KINDS."""
    if unknown := [name for name in names if name not in KINDS]:
        raise RequestError(f"allow: expected some of {', '.join(KINDS)}; got {', '.join(unknown)}")


def not_allowed(changes: Sequence[KindChange], allowed: Mapping[str, str]) -> list[str]:
    """The kinds of change that nobody has allowed, in the order of KINDS.

    Args:
        changes: What differs.
        allowed: Kind to how it is allowed.
    """
    found = {change.kind for change in changes}
    return [kind for kind in KINDS if kind in found and kind not in allowed]


def in_words(changes: Sequence[KindChange], allowed: Mapping[str, str]) -> dict[str, str]:
    """What differs, and how it is allowed, for records and for people: `signature vs live` to a sentence."""
    said: dict[str, list[str]] = {}
    for change in changes:
        said.setdefault(change.kind, []).append(str(change))
    return {
        _in_record(kind): _some_of(texts) + (f" (allowed {allowed[kind]})" if kind in allowed else "")
        for kind, texts in said.items()
    }


def kinds_in(verdicts: Mapping[str, str]) -> dict[str, str]:
    """What `in_words` has put into the record of a move."""
    return {name: said for name, said in verdicts.items() if name in _IN_RECORDS}


def kind_table(changes: Sequence[KindChange], allowed: Mapping[str, str] | None = None) -> Table:
    """A row for each thing that differs. allowed: kind to how it is allowed; None where that is not the question."""
    header = ("differs in", "what", "live", "candidate", *(["allowed"] if allowed is not None else []))
    rows: list[Sequence[Cell]] = []
    for change in changes[:MOST_ROWS]:
        how = (allowed or {}).get(change.kind)
        mark = [Mark(text=how or "no", good=how is not None)] if allowed is not None else []
        rows.append((change.kind, *map(_short, (change.of, change.live, change.candidate)), *mark))
    more = len(changes) - MOST_ROWS
    return Table(header=header, rows=rows, notes=[f"and {more:,} more differences"] if more > 0 else ())


def refusal(
    model: str, channel: str, release: str, live: str, changes: Sequence[KindChange], allowed: Mapping[str, str]
) -> GateError:
    """Why a release does not go live by itself, and the two ways to say yes.

    Args:
        model: Its name.
        channel: Where it would go live.
        release: The candidate's id.
        live: The live release's.
        changes: What differs, allowed or not.
        allowed: Kind to how it is allowed.
    """
    asked = not_allowed(changes, allowed)
    said = _some_of([f"{change.kind}: {change}" for change in changes if change.kind in asked])
    options = " ".join(f"--allow {kind}" for kind in asked)
    return GateError(
        f"{model} {channel}: release {release} is of another kind than {live}, which is live, and does not replace it "
        f"by itself: {said}. The live release stays. If this is meant: `ship promote {model} --from {release[:8]} "
        f"--to {channel} {options} --why …` puts this one live, and release: {{allow: [{', '.join(asked)}]}} in the "
        "job file allows it for good",
        kind_table(changes, allowed).text(),
    )


def _short(text: str) -> str:
    """Whoever made a release chooses its names: they go into the record of the next one's move."""
    return on_one_line(text, LONGEST_TEXT)


def _some_of(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - MOST_TEXTS:,} more"] if len(texts) > MOST_TEXTS else []
    return "; ".join([*texts[:MOST_TEXTS], *more])


def _in_record(kind: str) -> str:
    return f"{kind} vs live"


_IN_RECORDS = frozenset(map(_in_record, KINDS))

# ---- inputs and outputs


def _signature(live: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[KindChange]:
    ranges = [_ranges(side) for side in (live, candidate)]
    for side in ("inputs", "outputs"):
        before, after = _tensors(live, side), _tensors(candidate, side)
        if before is None or after is None:
            continue
        for name in dict.fromkeys([*before, *after]):
            one, two = before.get(name), after.get(name)
            if one is None or two is None or _other_tensor(one, two, side, *ranges):
                yield _of_signature(f"{side[:-1]} {name}", _tensor_text(one), _tensor_text(two))
        if before.keys() == after.keys() and list(before) != list(after):
            yield _of_signature(f"order of {side}", ", ".join(before), ", ".join(after))
    yield from _other_dimensions(live, candidate, *ranges)


def _of_signature(of: str, live: str, candidate: str) -> KindChange:
    return KindChange(kind=SIGNATURE, of=of, live=live, candidate=candidate)


def _tensors(signature: Mapping[str, Any], side: str) -> dict[str, Mapping[str, Any]] | None:
    """By name, in order; None where the release does not tell."""
    listed = signature.get(side)
    return {tensor["name"]: tensor for tensor in listed} if listed is not None else None


def _tensor_text(tensor: Mapping[str, Any] | None) -> str:
    return NONE if tensor is None else f"{tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"


Range = tuple[int, float]


def _ranges(signature: Mapping[str, Any]) -> dict[str, Range]:
    """Dynamic dimension to the sizes that it may have, both ends included."""
    return {
        dim["name"]: (dim["min"], math.inf if dim["max"] is None else dim["max"]) for dim in signature.get("dims", [])
    }


def _other_tensor(
    live: Mapping[str, Any],
    candidate: Mapping[str, Any],
    side: str,
    before: Mapping[str, Range],
    after: Mapping[str, Range],
) -> bool:
    """Whether whoever sends or gets the one cannot do so with the other. Limits of a dynamic size are told apart."""
    if live["dtype"] != candidate["dtype"] or len(live["shape"]) != len(candidate["shape"]):
        return True
    for one, two in zip(live["shape"], candidate["shape"], strict=True):
        if isinstance(one, int) and isinstance(two, int) and one != two:
            return True
        if isinstance(one, str) and isinstance(two, int) and (side == "inputs" or one in before):
            # A size that was an output's own could be any, and may have become one by chance.
            return True
        if isinstance(one, int) and isinstance(two, str):
            low, high = after.get(two, (0, math.inf))
            # An input that takes more sizes than before takes those of before.
            if side == "outputs" or not low <= one <= high:
                return True
    return False


def _other_dimensions(
    live: Mapping[str, Any], candidate: Mapping[str, Any], before: Mapping[str, Range], after: Mapping[str, Range]
) -> Iterator[KindChange]:
    """Dynamic dimensions that take fewer sizes, or that no longer go their own ways. Their names may change."""
    became: dict[str, dict[str, str]] = {}
    """By its name in the candidate: its names in the live release, to where that is."""
    follows: dict[str, set[str]] = {}
    """The other way round, of inputs and outputs."""
    for side in ("inputs", "outputs"):
        one, two = _tensors(live, side) or {}, _tensors(candidate, side) or {}
        for name in (name for name in one if name in two):
            for axis, sizes in enumerate(zip(one[name]["shape"], two[name]["shape"], strict=False)):
                old, new = sizes
                if not (isinstance(old, str) and isinstance(new, str)):
                    continue
                where = f"{side[:-1]} {name} axis {axis}"
                if side == "inputs":
                    became.setdefault(new, {}).setdefault(old, where)
                    follows.setdefault(old, set()).add(new)
                elif old in follows and new not in follows[old]:
                    yield _of_signature(where, old, new)
    for new, names in became.items():
        if len(names) > 1:
            yield _of_signature(" and ".join(names.values()), "sizes of their own", "always the same size")
        for old, where in names.items():
            if old not in before or new not in after:
                continue
            (low, high), (least, most) = before[old], after[new]
            if least > low or most < high:
                yield _of_signature(f"sizes of {where}", _range_text(low, high), _range_text(least, most))


def _range_text(low: int, high: float) -> str:
    return f"{low} or more" if high == math.inf else f"{low} to {high}"


# ---- classes


def _labels(live: Kind, candidate: Kind) -> Iterator[KindChange]:
    shown, next_shown = (kind.signature.get("labels") or () for kind in (live, candidate))
    if shown and next_shown:
        found = list(_names(shown, next_shown))
        # Columns keep their labels where the data's classes changed places: then the labels are wrong.
        yield from found or _names(live.classes, candidate.classes, " of the data")
        return
    if shown:
        # Whoever serves it shows them, and nothing that the data has stands in for them.
        yield KindChange(kind=LABELS, of="labels", live=", ".join(shown[:MOST_TEXTS]), candidate=NONE)
    # Of a release of before labels were recorded its classes are what its columns are called.
    names, next_names = live.classes, next_shown or candidate.classes
    if names and next_names:
        yield from _names(names, next_names)
        return
    before, after = _classes_of(live), _classes_of(candidate)
    if before and after and (_lacks(after, before) or _lacks(before, after)):
        counts = [f"{len(found)} ({_some(found)})" for found in (before, after)]
        yield KindChange(kind=LABELS, of="trained on", live=counts[0], candidate=counts[1])


def _names(live: Sequence[str], candidate: Sequence[str], whose: str = "") -> Iterator[KindChange]:
    """One change for all: where the names differ first, and how many there are. Nothing where one side has none."""
    if not live or not candidate:
        return
    longest = range(max(len(live), len(candidate)))
    texts = [[names[index] if index < len(names) else NONE for index in longest] for names in (live, candidate)]
    first = next((index for index in longest if texts[0][index] != texts[1][index]), None)
    if first is not None:
        said = [f"{text[first]} of {len(names)}" for names, text in zip((live, candidate), texts, strict=True)]
        yield KindChange(kind=LABELS, of=f"class {first}{whose}", live=said[0], candidate=said[1])


def _classes_of(kind: Kind) -> dict[int, int]:
    """Label to samples, where labels are classes: each has an output of its own, or there are two."""
    labels = {int(label): count for label, count in kind.labels.items()}
    # What losses are told to pass over is no class.
    labels = {label: count for label, count in labels.items() if label >= 0 and (label != 255 or 254 in labels)}
    outputs = _tensors(kind.signature, "outputs") or {}
    sizes = [size for tensor in outputs.values() for size in tensor["shape"][BATCH_AXIS + 1 :] if isinstance(size, int)]
    return labels if labels and max(labels) < max([2, *sizes]) else {}


def _lacks(one: Mapping[int, int], other: Mapping[int, int]) -> bool:
    """Whether one data set has none of a label of the other, and not by chance."""
    samples, of = sum(one.values()), sum(other.values())
    return any(label not in one and count * samples >= BY_CHANCE * of for label, count in other.items())


def _some(labels: Mapping[int, int]) -> str:
    names = [str(label) for label in sorted(labels)]
    return ", ".join(names) if len(names) <= 12 else ", ".join([*names[:6], "…", *names[-3:]])


_LABEL = re.compile(r"-?[0-9]{1,18}")


def _counts(found: Mapping[str, Any], names: re.Pattern[str] | None = None) -> Mapping[str, int]:
    """Counts by name; nothing where one is something else. names: how they have to be written."""
    sound = all(
        type(value) is int and 0 <= value <= MOST_COUNT and (names is None or names.fullmatch(name))
        for name, value in found.items()
    )
    return found if sound else {}


def _mapping(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, Mapping) else {}

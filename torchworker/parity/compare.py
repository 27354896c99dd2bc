"""The parity check of one artifact: it is asked every probe, and its answers are compared with the model's own."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchworker.contract import PARITY, ErrorCounts, Mismatch, Verdict
from torchworker.gates.limits import at_most
from torchworker.parity.folded import Held, folded
from torchworker.parity.histogram import ErrorHistogram, distribution
from torchworker.parity.probes import (
    BATCHES,
    DRAWS,
    EMPTY,
    LENGTHS,
    MASKS,
    NOT_FINITE,
    ROWS,
    SAMPLES,
    SINGLES,
    SIZES,
    Inputs,
    Probe,
)
from torchworker.parity.relative import compare_relative, usual_relative_loss
from torchworker.parity.rule import Parity, compare_tensors, usual_loss
from torchworker.process.failure import describe
from torchworker.process.fork import CrashNote
from torchworker.project.answers import same_values
from torchworker.project.metrics import flips, metric_sum
from torchworker.project.weights import values_of
from torchworker.runtimes.load import Call, Loaded

KNOWN = "ONNX counts index −1 from the end, where the model refuses it"
"""The one difference that a runtime's specification prescribes (ONNX Gather) and no exporter can mend."""

CALLS = 50
"""How often an artifact is asked at least: what it does at its 40th call differently, it does here."""

FOLDED_SIZE = 8192
"""Elements of the largest tensor that ONNX's exporter puts into a constant of another name, batch norms apart."""
NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
OF_ITS_SIZE = frozenset({BATCHES, SAMPLES, DRAWS, LENGTHS, SINGLES, SIZES, ROWS})
"""Questions whose inputs are as large as the data's, and so what the model loses on them."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is asked where formats differ by design. Values as in the job file's `parity`."""

    not_finite: str = "contained"
    """`contained`, `same` or `off`."""
    refusals: str = "known"
    """`known`, `same` or `off`."""
    relative: bool = False
    """Whether outputs that are never negative are compared in units of each element too."""


@dataclass(frozen=True)
class Finding:
    """One probe on which an artifact is not the model."""

    format: str
    probe: Probe
    output: str
    """Name of the output; empty when the artifact gave none."""
    outcome: Parity
    got: Tensor | None = None
    eager: Tensor | None = None

    @property
    def note(self) -> str:
        """One line: probe, output, what is wrong and where it is worst."""
        where = f"{self.output}: " if self.output else ""
        worst = f" at {self.outcome.worst}" if self.outcome.worst else ""
        return f"{self.probe.name}: {where}{self.outcome.note}{worst}"

    def mismatch(self) -> Mismatch:
        """What the report needs, without the tensors."""
        counted = distribution(self.got, self.eager) if self.got is not None and self.eager is not None else []
        return Mismatch(
            format=self.format,
            probe=self.probe.name,
            output=self.output,
            note=self.note.removeprefix(f"{self.probe.name}: "),
            ratio=self.outcome.ratio,
            distribution=counted,
        )


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """What came of the parity check of one artifact."""

    verdicts: list[Verdict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    histogram: ErrorHistogram = field(default_factory=ErrorHistogram)
    """How far all its answers are from the model's."""

    def __add__(self, other: ParityResult) -> ParityResult:
        return ParityResult(
            verdicts=self.verdicts + other.verdicts,
            findings=self.findings + other.findings,
            histogram=self.histogram + other.histogram,
        )

    def errors(self, kind: str) -> list[ErrorCounts]:
        """The histogram for the report. kind: the format, in words."""
        return self.histogram.counts(kind, frozenset(item.probe.group for item in self.findings))


class Decisions:
    """Predictions of the artifact that are not the model's own, over batches of validation samples."""

    def __init__(self) -> None:
        self.seen = self.flips = self.unexplained = 0
        self.largest = 0.0
        self.hits = [0.0, 0.0]
        """Right answers of the artifact and of the model."""
        self.asked = 0
        """Labels that count."""

    def add(self, got: Tensor, eager: Tensor, target: Tensor, allowed: float) -> None:
        """Count one batch.

        Args:
            got, eager: [batch, classes, …] scores, or [batch, …] one logit of the positive class.
            target: [batch, …] labels.
            allowed: difference of a score that rounding explains, in its own units.
        """
        if got.shape != eager.shape:
            return
        for side, answers in enumerate((got, eager)):
            right, asked = metric_sum("accuracy", answers, target)
            self.hits[side] += right
        self.asked += asked
        flipped, margin = flips(got, eager, target)
        self.seen += flipped.numel()
        self.flips += int(flipped.sum())
        # Both answers may be this far from the truth, in opposite directions, in both of two scores.
        beyond = flipped & ~(margin <= 4 * allowed)
        self.unexplained += int(beyond.sum())
        self.largest = max(self.largest, float(margin[flipped].max()) if bool(flipped.any()) else 0.0)

    def verdict(self, kind: str) -> Verdict:
        """Fails when a prediction differs whose margin is more than rounding explains, or when none was compared."""
        note = f"{self.flips} of {self.seen} predictions differ"
        if self.flips:
            note += f", {self.unexplained} by more than rounding explains, the clearest by {self.largest:.2g}"
        if self.asked:
            note += f"; accuracy {self.hits[0] / self.asked:.4g}, the model's own {self.hits[1] / self.asked:.4g}"
        return at_most(kind, PARITY, "predictions", float(self.unexplained) if self.seen else None, 0, note)


def compare(
    kind: str,
    call: Call,
    probes: Sequence[Probe],
    outputs: Sequence[str],
    policy: Policy,
    outside: Outside | None = None,
) -> ParityResult:
    """One verdict for each batch of capture, one for all other probes, one for how the artifact behaves.

    Args:
        kind: the format, in words.
        call: the artifact: inputs by name to outputs in the order of the signature.
        probes: with the model's answers. None is a failure: nothing was shown.
        outputs: names in the order of the signature.
        policy: what is asked where formats differ by design.
        outside: what is known of questions outside the signature.

    Returns:
        Verdicts, every output that is not the model's, and how far all are from it. It raises nothing that the
        artifact raises; an artifact that ends its process ends this one.
    """
    check = ParityCheck(kind, call, outputs, policy, usual_losses(probes, outputs, policy), outside)
    verdicts, findings = [], []
    rest: list[tuple[Probe, float, str]] = []
    for probe in probes:
        ratio, found, note = check.ask(probe)
        findings += found
        if probe.group == BATCHES:
            shown = "; ".join(item.note for item in found) or note
            verdicts.append(verdict(kind, probe.name.replace("_", " "), ratio, shown))
        elif not _skipped(probe, policy):
            rest.append((probe, ratio, "; ".join(item.note for item in found) or note))
    verdicts.append(_summary(kind, rest))
    golden = [probe for probe in probes if probe.group == BATCHES]
    for probe in golden[1:2]:
        ratio, found, note = check.behaviour(probe, golden[0])
        findings += found
        verdicts.append(verdict(kind, "called again", ratio, note))
    return ParityResult(verdicts=verdicts, findings=findings, histogram=check.histogram)


class Usual(NamedTuple):
    """What the model itself loses on one output."""

    absolute: float = 0.0
    """Of `usual_loss`, in the output's own units."""
    relative: float | None = None
    """Of `usual_relative_loss`; None where that is not asked."""


def usual_losses(probes: Sequence[Probe], outputs: Sequence[str], policy: Policy) -> dict[str, Usual]:
    """What the model itself loses on each output, over all questions of the size of the data."""
    sized = [probe for probe in probes if probe.group in OF_ITS_SIZE]
    answers = {name: [(probe.eager[name], probe.rounding(name)) for probe in sized if probe.eager] for name in outputs}
    roundoff = max((probe.roundoff for probe in sized), default=0.0)
    return {
        name: Usual(usual_loss(given, roundoff), usual_relative_loss(given, roundoff) if policy.relative else None)
        for name, given in answers.items()
    }


def verdict(kind: str, case: str, ratio: float | None, note: str) -> Verdict:
    """The verdict of parity.

    Args:
        kind: the format, in words.
        case: what was asked.
        ratio: of `Parity`; None when there is none, which is a failure.
        note: for the reader.
    """
    return at_most(kind, PARITY, case, ratio, 1, note)


def same_weights(kind: str, loaded: Loaded, trained: Path, renamed: Mapping[str, str] | None = None) -> list[Verdict]:
    """One verdict on the weights that an artifact holds: bit for bit what was trained, by name and where shapes fit;
    of ONNX also what its exporter made of them, by the rules of `folded.py`.

    Samples may not reach a row of an embedding, or a weight behind a decision.

    Args:
        kind: the format, in words.
        loaded: the artifact.
        trained: safetensors file of the weights.
        renamed: name in the artifact to name in the file; None where they are the same.

    Returns:
        Nothing where no name and shape is the model's: compiled code, or constants folded into others.
    """
    from safetensors import safe_open

    different: list[str] = []
    equal: set[str] = set()
    with safe_open(trained, framework="pt") as file:
        names = set(file.keys())
        asked = {name: name for name in names} if renamed is None else renamed
        asked = {name: own for name, own in asked.items() if own in names}
        for name, tensor in loaded.weights(asked.keys()):
            if name not in asked:
                continue
            mine = file.get_tensor(asked[name])
            if tensor.dtype != mine.dtype or tensor.shape != mine.shape:
                continue
            if torch.equal(_bits(tensor), _bits(mine)):
                equal.add(name)
            else:
                different.append(name)
        if loaded.graph is not None:
            held = _folded(loaded.graph(), file, asked, equal)
            different += sorted(held.different - set(different))
            equal |= held.equal
            equal -= set(different)
    if not equal and not different:
        return []
    note = f"{len(equal)} of {len(names)} tensors held bit for bit"
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        note = f"other values than were trained: {', '.join(different[:3])}{more}"
    return [at_most(kind, PARITY, "weights", float(len(different)), 0, note)]


def _folded(graph: Any, file: Any, names: Mapping[str, str], equal: Collection[str]) -> Held:
    """What an ONNX file holds of the weights that it does not have by name.

    Args:
        graph: onnx_ir.Graph.
        file: of safetensors, open.
        names: in the artifact, to those in the file.
        equal: names that the artifact holds as they were trained.
    """
    trained: dict[str, Tensor] = {}
    for name, own in names.items():
        size = math.prod(file.get_slice(own).get_shape())
        # Of those that are there by name, small ones may be in a constant too.
        if name not in equal or size <= FOLDED_SIZE:
            trained[name] = file.get_tensor(own)
    arrays = {name: tensor.numpy() for name, tensor in trained.items() if tensor.dtype in NUMPY_FLOATS}
    held = folded(graph, arrays, equal)
    # Of small tensors that are the same an ONNX file has one, under one of the names.
    kept = {_content(trained[name]) for name in {*held.equal, *equal} & trained.keys()}
    there = graph.initializers.keys() | held.different
    alike = {
        name
        for name, tensor in trained.items()
        if name not in there and tensor.numel() <= FOLDED_SIZE and _content(tensor) in kept
    }
    return Held(held.equal | alike, held.different)


def _content(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, _bits(tensor).numpy().tobytes()


def _bits(tensor: Tensor) -> Tensor:
    return values_of(tensor).reshape(-1).view(torch.uint8)


def _summary(kind: str, asked: Sequence[tuple[Probe, float, str]]) -> Verdict:
    """One line for every probe that is not a batch of capture."""
    if not asked:
        return verdict(kind, "probes", None, "none was asked")
    failed = [(probe, note) for probe, ratio, note in asked if not ratio <= 1]
    counts: dict[str, int] = {}
    for probe, _, _ in asked:
        counts[probe.group] = counts.get(probe.group, 0) + 1
    told = "; ".join(dict.fromkeys(note for _, _, note in asked if note == KNOWN))
    note = ", ".join(f"{group} {count}" for group, count in counts.items()) + (f"; {told}" if told else "")
    if failed:
        shown = "; ".join(note for _, note in failed[:3])
        note = f"{len(failed)} failed: {shown}" + (f"; and {len(failed) - 3} more" if len(failed) > 3 else "")
    return verdict(kind, f"{len(asked)} probes", max(ratio for _, ratio, _ in asked), note)


def _skipped(probe: Probe, policy: Policy) -> bool:
    return (probe.group == NOT_FINITE and policy.not_finite == "off") or (
        probe.eager is None and policy.refusals == "off"
    )


@dataclass(kw_only=True)
class Outside:
    """Questions outside the signature, any of which may end the process of an artifact: that costs one verdict."""

    asking: CrashNote = field(default_factory=CrashNote)
    """The probe that is being asked, for whoever outlives it; empty when it is another one."""
    deadly: dict[str, str] = field(default_factory=dict)
    """Those that have ended a process before, and how, in words; they are not asked again."""


class ParityCheck:
    """Asks one artifact, and remembers what later questions need: its first answers, and inputs that it wrote into."""

    def __init__(
        self,
        kind: str,
        call: Call,
        outputs: Sequence[str],
        policy: Policy,
        usual: Mapping[str, Usual],
        outside: Outside | None = None,
    ) -> None:
        """
        Args:
            kind: the format, in words.
            call: the artifact.
            outputs: names in the order of the signature.
            policy: what is asked where formats differ by design.
            usual: by output, of `usual_losses`.
            outside: what is known of questions outside the signature.
        """
        self.kind, self.call, self.outputs, self.policy, self.usual = kind, call, outputs, policy, usual
        self.outside = outside or Outside()
        self.first: dict[str, list[Tensor]] = {}
        """Answers to the batches of capture, to be asked for again."""
        self.changed: dict[str, str] = {}
        """Inputs that the artifact wrote into: input to probe."""
        self.calls = 0
        """Answers that it gave."""
        self.given: tuple[str, list[Tensor], list[Tensor]] = ("", [], [])
        """The last probe, its answer as it was given, which whoever asked may still hold, and a copy of it."""
        self.overwritten = ""
        """The first answer that a later call changed, in words."""
        self.histogram = ErrorHistogram()

    def ask(self, probe: Probe) -> tuple[float, list[Finding], str]:
        """(worst ratio, what failed, a note)."""
        if _skipped(probe, self.policy):
            return 0.0, [], ""
        if probe.name in self.outside.deadly:
            return self._failed(probe, self.outside.deadly[probe.name])
        try:
            self.outside.asking.write("" if probe.declared else probe.name)
            got = self._ask(probe.name, probe.inputs)
        except Exception as error:
            if probe.eager is None or not probe.declared:
                return 0.0, [], ""
            return self._failed(probe, describe(error).split("\n")[0][:300])
        if probe.eager is None:
            if self.policy.refusals == "known" and self.kind == "onnx" and probe.name.startswith("minus_one"):
                return 0.0, [], KNOWN
            return self._failed(probe, f"answers where the model refuses: {probe.error}")
        if probe.group == BATCHES and len(got) == len(self.outputs):
            self.first[probe.name] = [tensor.clone() for tensor in got]
        return self._compare(probe, got)

    def behaviour(self, probe: Probe, smallest: Probe) -> tuple[float, list[Finding], str]:
        """The same question after all the others, twice, and once more when there were CALLS; another one until then;
        with other strides; and whether inputs, and answers that were given, were left alone.

        Args:
            probe: a batch of capture.
            smallest: another one, which is asked over and over.
        """
        assert probe.eager is not None, "a batch of capture"
        self.outside.asking.write("")
        if probe.name not in self.first or smallest.name not in self.first:
            return self._failed(probe, "gave no outputs to compare the first time")
        turns = [("after the other probes", probe), ("and once more", probe)]
        turns += [(f"as call {number}", smallest) for number in range(self.calls + 3, CALLS)]
        turns += [(f"as call {self.calls + len(turns) + 1}", probe)]
        for turn, asked in turns:
            try:
                again = self._ask(asked.name, asked.inputs)
            except Exception as error:
                return self._failed(asked, f"asked {turn}: {describe(error)}")
            if len(again) != len(self.outputs):
                return self._failed(asked, f"asked {turn}: {len(again)} outputs, expected {len(self.outputs)}")
            for name, one, two in zip(self.outputs, self.first[asked.name], again, strict=True):
                if not same_values(one, two):
                    return self._failed(asked, f"{name}: gives another answer when asked {turn}: it keeps state")
        strided = replace(probe, inputs={name: _strided(tensor) for name, tensor in probe.inputs.items()})
        ratio, found, note = self._strides(strided)
        if self.changed:
            wrote = ", ".join(f"{name} (probe {where})" for name, where in self.changed.items())
            return self._failed(probe, f"writes into its inputs: {wrote}")
        if self.overwritten:
            return self._failed(probe, self.overwritten)
        return ratio, found, note

    def _strides(self, probe: Probe) -> tuple[float, list[Finding], str]:
        try:
            got = self._ask(probe.name, probe.inputs)
        except Exception as error:
            return self._failed(probe, f"inputs that are not contiguous: {describe(error)}")
        ratio, found, _ = self._compare(probe, got)
        named = [replace(item, probe=replace(probe, name=f"{probe.name}, not contiguous")) for item in found]
        return ratio, named, "; ".join(item.note for item in named) or "same answer; inputs left alone"

    def _ask(self, name: str, inputs: Inputs) -> list[Tensor]:
        given = {key: tensor if not tensor.is_contiguous() else tensor.clone() for key, tensor in inputs.items()}
        kept = {key: tensor.clone() for key, tensor in inputs.items()}
        got = self.call(given)
        self.calls += 1
        for key, tensor in given.items():
            if not same_values(tensor, kept[key]):
                self.changed.setdefault(key, name)
        before, held, copies = self.given
        if not self.overwritten and not all(map(same_values, held, copies)):
            self.overwritten = f"the answer to {before} changes when {name} is asked: both are in the same memory"
        self.given = name, got, [tensor.clone() for tensor in got]
        return got

    def _failed(self, probe: Probe, reason: str) -> tuple[float, list[Finding], str]:
        outcome = Parity(ratio=float("inf"), max_difference=float("nan"), reason=reason)
        return float("inf"), [Finding(self.kind, probe, "", outcome)], reason

    def _compare(self, probe: Probe, got: list[Tensor]) -> tuple[float, list[Finding], str]:
        assert probe.eager is not None, "asked before"
        if len(got) != len(self.outputs):
            return self._failed(probe, f"{len(got)} outputs, expected {len(self.outputs)}")
        ratio, findings, notes = 0.0, [], []
        for name, tensor in zip(self.outputs, got, strict=True):
            outcome = self._output(probe, name, tensor)
            self.histogram.add(probe.group, tensor, probe.eager[name])
            ratio = max(ratio, outcome.ratio)
            notes.append(f"{name}: {outcome.note}")
            if not outcome.passed:
                findings.append(Finding(self.kind, probe, name, outcome, tensor.clone(), probe.eager[name]))
        return ratio, findings, "; ".join(notes)

    def _output(self, probe: Probe, name: str, got: Tensor) -> Parity:
        assert probe.eager is not None, "asked before"
        shown = probe.touched or not _finite(probe.eager)
        if probe.group == BATCHES or not shown:
            return compare_output(got, probe, name, self.usual[name])
        # Of a sample of which a mask leaves nothing the model may say NaN, and hides no input that is NaN.
        policy = "off" if probe.group == MASKS else self.policy.not_finite
        return not_finite(got, probe, name, policy, self.usual[name].absolute)


def compare_output(got: Tensor, probe: Probe, name: str, usual: Usual | None = None) -> Parity:
    """Compare an output with the model's own answer to the probe.

    Args:
        got: the artifact's, [batch, …].
        probe: with the model's answers.
        name: of the output.
        usual: of `usual_losses`.
    """
    assert probe.eager is not None, "asked before"
    usual = usual or Usual()
    answers = probe.eager[name], probe.exact.get(name), probe.perturbed.get(name)
    outcome = compare_tensors(got, *answers, probe.tied.get(name), usual=usual.absolute, roundoff=probe.roundoff)
    if usual.relative is None or not outcome.passed:
        return outcome
    relative = compare_relative(got, *answers, usual=usual.relative, roundoff=probe.roundoff)
    return (
        outcome if relative is None or relative.ratio <= outcome.ratio else replace(relative, allowed=outcome.allowed)
    )


def not_finite(got: Tensor, probe: Probe, name: str, policy: str, usual: float = 0.0) -> Parity:
    """Compare an output of a batch in which something is NaN or infinite.

    `same`: NaN and infinities in the same places. `contained` (and `off`): a sample whose output shows it must show
    it in the artifact too, in any element; every other sample must agree as always.

    Args:
        got: the artifact's output, [batch, …].
        probe: with the model's answers; `touched` are the samples whose inputs are not finite.
        name: of the output.
        policy: `contained`, `same` or `off`.
        usual: of `usual_loss`.
    """
    assert probe.eager is not None, "asked before"
    eager = probe.eager[name]
    others = [answers.get(name) for answers in (probe.exact, probe.perturbed, probe.tied)]
    if got.dtype != eager.dtype or got.shape != eager.shape:
        return compare_output(got, probe, name)
    real = eager.is_floating_point()
    if policy == "same":
        if real and not bool(eager.isfinite().any()):
            outcome = compare_tensors(got.nan_to_num(), eager.nan_to_num(), None)
            same = same_values(got, eager)
            return replace(
                outcome, ratio=0.0 if same else float("inf"), reason="" if same else "NaN or infinity differ"
            )
        return compare_output(got, probe, name)
    touched = list(probe.touched)
    if eager.dim() == 0:
        if probe.group == EMPTY:
            # Of no samples: a mean of nothing is NaN in torch and 0 elsewhere.
            return Parity(ratio=0.0, max_difference=0.0)
        # One number of all samples is one row, which each of them touches.
        got, eager, touched = got[None], eager[None], touched and [0]
        others = [None if tensor is None else tensor.reshape(-1) for tensor in others]
    rows = torch.ones(len(eager), dtype=torch.bool)
    rows[touched] = False
    if real:
        shows, hidden = ~_row_finite(eager), _row_finite(got)
        rows &= ~shows
        if policy != "off" and bool((shows & hidden).any()):
            place = int((shows & hidden).nonzero()[0])
            reason = (
                f"sample {place}: a finite answer hides the NaN or infinity that the model shows; if no input is ever "
                "NaN or infinite, parity.not_finite: off"
            )
            return Parity(ratio=float("inf"), max_difference=float("nan"), reason=reason)
    if not bool(rows.any()):
        return Parity(ratio=0.0, max_difference=0.0)
    chosen = [tensor[rows] if tensor is not None and tensor.shape == eager.shape else None for tensor in others]
    return compare_tensors(got[rows], eager[rows], *chosen, usual=usual, roundoff=probe.roundoff)


def _row_finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().flatten(1).all(1) if tensor.dim() > 1 else tensor.isfinite()


def _finite(outputs: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outputs.values() if tensor.is_floating_point())


def _strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]

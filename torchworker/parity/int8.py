"""Is an int8 variant still the model? Its own rule, because rounding to 8 bits is no matter of float32's rounding.

On the validation samples, which calibration has not seen: the ratio of signal to quantization noise (SQNR) of every
output, the share of predictions that are the model's own, how sure the model was of those that differ, and what the
metrics lose. On the other probes: that it answers, with the right dtypes and shapes, finite where the model is, and
twice the same. Inputs far outside the data, and NaN, are not asked: eight bits have no room for them.

The limits are the job's (`export.quantize`); why their defaults are what they are:

- *SQNR, 30 dB.* A uniform quantizer of b bits has 6.02 b + 4.77 − 20 log10(c) dB for a signal whose peak is c times its
  rms (Bennett, "Spectra of Quantized Signals", Bell System Technical Journal 27, 1948; c = √2, a sine, is the known
  6.02 b + 1.76). Eight bits and a normal signal cut at c = 4 make 40.9 dB. Noises of layers that do not know of each
  other add up: ten of them cost 10 dB. So 30 dB, which is noise of 3 % of the signal, is what a network of about ten
  layers has when nothing is wrong with it; some have more.
- *Flip margin, 0.25; agreement, 0.99; loss of a metric, 0.01.* Chosen, not derived. Noise of 3 % in both of two scores
  moves their difference by 0.045 of the scores' rms; a flip at a quarter of the usual margin takes more than five times
  that where this margin is about the scores' rms. It is then no matter of noise. What becomes of real models
  under these limits is measured in docs/serving-speed.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchworker.contract import METRICS, Int8, Int8Limits, TensorSpec, Verdict
from torchworker.parity.probes import BATCHES, NOT_FINITE, SCALES, Inputs, Probe
from torchworker.parity.reference import validation_batches
from torchworker.process.failure import describe
from torchworker.project.metrics import MetricSums, flips
from torchworker.runtimes.load import Call

INT8 = "int8"
"""The gate of these verdicts."""
SILENT = 200.0
"""Decibels where nothing differs: no logarithm has them, and float32 has no more than 6.02 · 24 + 1.76 = 146."""
BOUNDLESS = 1e9
"""A loss or margin for which there is no unit."""


class Noise:
    """Signal and noise of the float outputs, added up over batches."""

    def __init__(self) -> None:
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def add(self, name: str, got: Tensor, eager: Tensor) -> None:
        """Add one output of one batch.

        Args:
            name: of the output.
            got, eager: floating point, of one shape; counted where eager is finite.
        """
        finite = eager.isfinite()
        truth = eager.double()[finite]
        self._signal[name] = self._signal.get(name, 0.0) + float(truth.square().sum())
        self._noise[name] = self._noise.get(name, 0.0) + float((got.double()[finite] - truth).square().sum())

    @property
    def decibels(self) -> float:
        """Of the noisiest output."""
        return min((_decibels(self._signal[name], self._noise[name]) for name in self._signal), default=SILENT)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return SILENT
    return max(-SILENT, 10 * math.log10(signal / noise)) if signal and math.isfinite(noise) else -SILENT


class Predictions:
    """Decisions of the variant beside the model's own, added up over batches."""

    def __init__(self) -> None:
        self._margins: list[Tensor] = []
        self._flipped: list[Tensor] = []

    def add(self, got: Tensor, eager: Tensor, target: Tensor) -> None:
        """Add one batch.

        Args:
            got, eager: [batch, classes, …] scores, or [batch, …] one logit of the positive class.
            target: [batch, …] labels.
        """
        flipped, margin = flips(got, eager, target)
        self._margins.append(margin.flatten())
        self._flipped.append(flipped.flatten())

    @property
    def agreement(self) -> float | None:
        """Share of predictions that are the model's own; None where there are none."""
        return 1 - float(torch.cat(self._flipped).double().mean()) if self._flipped else None

    @property
    def flip_margin(self) -> float | None:
        """How sure the model was of the clearest prediction that differs, in units of its median margin."""
        if not self._flipped:
            return None
        margins, flipped = torch.cat(self._margins), torch.cat(self._flipped)
        if not bool(flipped.any()):
            return 0.0
        usual = float(margins.median())
        return float(margins[flipped].max()) / usual if usual else BOUNDLESS


def examine(
    call: Call,
    probes: Sequence[Probe],
    validation: Mapping[str, Tensor],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    metrics: Sequence[str],
    batch: int,
    limits: Int8Limits,
) -> tuple[Int8, dict[str, float]]:
    """What the rule says of one variant, and its metrics.

    Args:
        call: the variant.
        probes: with the float model's answers.
        validation: tensors of VALIDATION, [samples, …], and the model's answers to them.
        inputs: in the order of the signature.
        outputs: names in the order of the signature.
        metrics: names in METRICS.
        batch: samples of a call, as the reference outputs were made.
        limits: what it has to keep to.

    Returns:
        The numbers, with the reason where a limit is not kept; metric to value, empty where it could not be measured.
    """
    wrong = behaviour(call, probes, outputs)
    if wrong:
        return Int8(reason=wrong), {}
    noise, predictions = Noise(), Predictions()
    mine, beside, own = (MetricSums(metrics) for _ in range(3))
    for probe, target in validation_batches(validation, inputs, batch, outputs):
        try:
            got = call(probe.inputs)
        except Exception as error:
            return Int8(reason=f"it fails on validation samples: {describe(error).splitlines()[0][:200]}"), {}
        eager = probe.eager or {}
        if eager and (wrong := _structure(got, eager)):
            return Int8(reason=f"{probe.name}: {wrong}"), {}
        mine.add(got[0], target)
        if not eager:
            # There was no time to ask the model.
            continue
        for position, (name, tensor) in enumerate(eager.items()):
            if tensor.is_floating_point():
                noise.add(name, got[position], tensor)
            if position == 0 and "accuracy" in metrics:
                predictions.add(got[0], tensor, target)
        beside.add(got[0], target)
        own.add(next(iter(eager.values())), target)
    values, there, theirs = mine.means(), beside.means(), own.means()
    found = Int8(
        sqnr_db=noise.decibels,
        golden_sqnr_db=golden_noise(call, probes, outputs).decibels,
        agreement=predictions.agreement,
        flip_margin=predictions.flip_margin,
        losses={name: loss(name, value, theirs[name]) for name, value in there.items()},
    )
    return Int8(**{**vars(found), "reason": verdict(found, limits)}), values


def loss(metric: str, mine: float, own: float) -> float:
    """How much worse a metric is than the model's own: of accuracy its difference, of an error the share of it."""
    if METRICS.get(metric) == "higher":
        return own - mine
    return (mine - own) / own if own else (0.0 if mine <= own else BOUNDLESS)


def verdict(found: Int8, limits: Int8Limits) -> str:
    """Why the variant is not kept; empty when it is inside all limits."""
    reasons = []
    worst = min(found.sqnr_db, found.golden_sqnr_db)
    if not worst >= limits.sqnr_db:
        reasons.append(f"SQNR {worst:.1f} dB, expected at least {limits.sqnr_db:g}")
    if found.agreement is not None and found.agreement < limits.agreement:
        reasons.append(f"{found.agreement:.2%} of its predictions are the model's, expected {limits.agreement:.2%}")
    if found.flip_margin is not None and found.flip_margin > limits.flip_margin:
        reasons.append(
            f"a prediction differs of which the model was {found.flip_margin:.2f} times as sure as of most, expected "
            f"at most {limits.flip_margin:g}"
        )
    for name, lost in found.losses.items():
        if lost > limits.metric_loss:
            reasons.append(f"{name} loses {lost:.3g}, expected at most {limits.metric_loss:g}")
    return "; ".join(reasons)


def kept(kind: str, found: Int8, limits: Int8Limits | None, samples: int) -> list[Verdict]:
    """The numbers of a variant that is inside all limits, as verdicts.

    Args:
        kind: the variant.
        found: its numbers.
        limits: those that it kept to.
        samples: validation samples that they are of.
    """
    assert limits is not None, "whoever makes a variant says what is asked of it"
    rows: list[tuple[str, float | None, str]] = [
        ("SQNR, dB", min(found.sqnr_db, found.golden_sqnr_db), f">= {limits.sqnr_db:g}"),
        ("agreement", found.agreement, f">= {limits.agreement:g}"),
        ("flip margin", found.flip_margin, f"<= {limits.flip_margin:g}"),
        *((f"loss of {name}", lost, f"<= {limits.metric_loss:g}") for name, lost in found.losses.items()),
    ]
    return [
        Verdict(format=kind, gate=INT8, case=f"{case}, {samples} samples", measured=measured, limit=limit, passed=True)
        for case, measured, limit in rows
        if measured is not None
    ]


def behaviour(call: Call, probes: Sequence[Probe], outputs: Sequence[str]) -> str:
    """What is wrong with the answers besides their rounding; empty when nothing is."""
    for probe in probes:
        if probe.eager is None or not probe.declared or probe.touched or probe.group in (NOT_FINITE, SCALES):
            continue
        try:
            first = [tensor.clone() for tensor in call(_copied(probe.inputs))]
            second = call(_copied(probe.inputs)) if probe.group == BATCHES else first
        except Exception as error:
            return f"{probe.name}: {describe(error).splitlines()[0][:200]}"
        if wrong := _structure(first, {name: probe.eager[name] for name in outputs}):
            return f"{probe.name}: {wrong}"
        if not all(torch.equal(one, two) for one, two in zip(first, second, strict=True)):
            return f"{probe.name}: gives another answer when asked twice"
    return ""


def golden_noise(call: Call, probes: Sequence[Probe], outputs: Sequence[str]) -> Noise:
    """Over the golden inputs, which are in the release: what a rehearsal can ask again."""
    noise = Noise()
    for probe in probes:
        if probe.group == BATCHES and probe.eager is not None:
            for name, got in zip(outputs, call(_copied(probe.inputs)), strict=True):
                if probe.eager[name].is_floating_point():
                    noise.add(name, got, probe.eager[name])
    return noise


def _copied(inputs: Inputs) -> Inputs:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def _structure(got: Sequence[Tensor], eager: Mapping[str, Tensor]) -> str:
    if len(got) != len(eager):
        return f"{len(got)} outputs, expected {len(eager)}"
    for tensor, (name, wanted) in zip(got, eager.items(), strict=True):
        if (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
            return f"{name}: {tensor.dtype} {list(tensor.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
        if wanted.is_floating_point() and not bool(tensor[wanted.isfinite()].isfinite().all()):
            return f"{name}: not finite where the model is"
    return ""

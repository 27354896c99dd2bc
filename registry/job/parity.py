"""The part of a job file that says what is asked of artifacts where formats differ by design: `parity`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from train_and_ship.registry.job.base import Part


class Parity(Part):
    """How artifacts are held against the model. The defaults are what a release should keep."""

    came_later: ClassVar[frozenset[str]] = frozenset({"coupled", "min_samples", "relative", "seconds"})

    not_finite: Literal["contained", "same", "off"] = "contained"
    """NaN and infinity in an input: contained, a sample that shows them must show them in every format and no other
    sample changes; same, in the very same elements; off, not asked"""
    refusals: Literal["known", "same", "off"] = "known"
    """inputs that the model refuses: known, every format refuses them, except that ONNX counts index −1 from the end;
    same, no exception; off, not asked"""
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    """how long the model is asked about held-out samples, in float32 and in float64, in an order drawn by train.seed:
    until all are asked or so many seconds of computing are spent; when absent, a tenth of the training's seconds and at
    least 60. Other questions are asked whatever they take"""
    min_samples: int = Field(256, ge=1)
    """fewer held-out samples that were asked fail the release, unless there are no more"""
    relative: bool = False
    """true: outputs that are never negative, such as probabilities of rare events, have to be as near in units of each
    element as they are in units of the whole output; for scores that are ranked or whose logarithm is taken, see
    parity.md"""
    cpp: Literal["when_possible", "required", "off"] = "when_possible"
    """TorchScript and AOTInductor are also run by a small C++ program, which a C++ compiler builds on the first
    run on a machine: when_possible, reported as not run where there is none; required, a failure there; off"""

    coupled: Literal["refused", "allowed"] = "refused"
    """answers that depend on the other samples of a batch: refused, with the module and line they come from; allowed,
    gates are measured one sample at a time, as the release is then served: its signature has a batch of 1, and no
    server puts requests together"""

    @field_validator("not_finite", "refusals", "cpp", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value

"""The parts of a job file that say which data it is, and what it has to be like: `data.snapshot`, `data.checks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from shipreader.records import MOST_LABELS
from train_and_ship.registry.job.base import Part


class Snapshot(Part):
    """Data that is known by a manifest: the factory is given its verified folder as `snapshot`."""

    path: str = Field(min_length=1)
    """folder, relative to the project, or s3://bucket/prefix"""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """of its SNAPSHOT.json; when absent, whichever is there"""


class TensorCheck(Part):
    """What one input, or `target`, has to be like."""

    dtype: str | None = None
    """such as float32 or int64"""
    shape: tuple[int | None, ...] | None = Field(None, strict=False)
    """of one sample, null where any size will do: [1, 8, 8]"""
    min: float | None = None
    """smallest value that it may have"""
    max: float | None = None
    """largest value that it may have"""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min <= max, and {self.min:g} > {self.max:g}")
        return self


class Labels(Part):
    """What the labels have to be like, where the target is one whole number a sample."""

    most: ClassVar[Mapping[str, int]] = {"allowed": MOST_LABELS}

    allowed: tuple[int, ...] | None = Field(None, strict=False)
    """labels that may occur"""
    min_share: float = Field(0.0, ge=0, le=1)
    """smallest part of the samples of each label, in each split"""


class Drift(Part):
    """How far the training data may be from that of the live release, column by column."""

    psi: float | None = Field(0.25, gt=0)
    """largest population stability index, over deciles or labels"""
    ks: float | None = Field(None, gt=0, le=1)
    """largest Kolmogorov-Smirnov statistic"""
    ignore: tuple[str, ...] = Field((), strict=False)
    """columns that may drift: x, x[3] or target"""


class Checks(Part):
    """What is asked of the data; a failure stops the run before training."""

    tensors: dict[str, TensorCheck] = Field(default_factory=dict)
    """by input name, or target"""
    missing: float = Field(0.0, ge=0, le=1)
    """largest part of a tensor that is NaN or infinite"""
    outside: float = Field(0.0, ge=0, le=1)
    """largest part of a tensor outside its min and max"""
    overlap: float = Field(0.0, ge=0, le=1)
    """largest part of the validation samples that are training samples, bit by bit"""
    repeated: float = Field(1.0, ge=0, le=1)
    """largest part of a split that repeats another of its samples"""
    samples: int = Field(1, ge=1)
    """least number of training samples"""
    shrinks: float | None = Field(None, ge=0, le=1)
    """largest part of the live release's training samples that may be gone"""
    labels: Labels = Labels()
    drift: Drift | None = Drift()
    """against the live release's data; null asks nothing"""

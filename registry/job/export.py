"""The `export` part of a job file: which artifacts are made, and which of their dimensions stay dynamic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from shipreader.records import LONGEST_PATH, MOST_LABELS, file_above, stays_below, wrong_labels
from train_and_ship.registry.job.base import Part, Target

Format = Literal["torchscript", "onnx", "pt2", "aoti", "executorch"]
OPT_IN: tuple[Format, ...] = ("executorch",)
"""What `auto` does not try: it asks more of a job than a model does."""
Axis = Annotated[int, Field(ge=1)]


def _is_dimension(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("letters, digits and underscores, such as length")
    if name == "batch":
        raise ValueError("another name than batch: the first dimension of every input is dynamic already")
    return name


def _is_inside(name: str) -> str:
    """Without the slash behind a folder's name."""
    inside = name.removesuffix("/")
    if not stays_below(inside):
        raise ValueError(
            "a file or folder of the project, such as tokenizer/ or data/labels.json: a relative path with / between "
            f"its parts, no . or .. among them, and at most {LONGEST_PATH} characters"
        )
    return inside


class Dynamic(Part):
    """A dimension whose size may change from call to call, and where it is in the inputs."""

    axes: dict[str, Axis | Annotated[tuple[Axis, ...], Field(strict=False, min_length=1)]] = Field(min_length=1)
    """input name: axis, or a list of axes, counted from 0, which is the batch"""
    min: int = Field(1, ge=1)
    """smallest size that users will send"""
    max: int | None = Field(None, ge=1)
    """largest size; no limit when absent"""

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.max is not None and self.max <= self.min:
            raise ValueError(f"min < max, and {self.min} >= {self.max}")
        return self


Int8 = Literal["onnx-int8-dynamic", "onnx-int8-static", "pt2e-int8"]


class Quantize(Part):
    """Which int8 variants are tried, and what they have to keep to: one that does not is left out of the release."""

    formats: Literal["auto"] | Annotated[tuple[Int8, ...], Field(strict=False, min_length=1)] = "auto"
    """onnx-int8-dynamic and onnx-int8-static by ONNX Runtime, pt2e-int8 by torchao and AOTInductor (needs the extra
    torchao and a C++ compiler); auto: the first two"""
    samples: int = Field(256, ge=1)
    """training samples from which the ranges of activations are taken"""
    sqnr_db: float = Field(30, gt=0)
    """smallest ratio of signal to quantization noise on validation samples, in decibels"""
    agreement: float = Field(0.99, ge=0, le=1)
    """smallest share of validation predictions that are the model's own"""
    flip_margin: float = Field(0.25, ge=0)
    """how sure the model may have been of a prediction that differs, in units of its median margin (difference of the
    two best scores)"""
    metric_loss: float = Field(0.01, ge=0)
    """largest loss of any quality metric: of accuracy its difference, of an error that share of it"""
    speedup: float = Field(1.1, gt=0)
    """how many times as fast as its float format it has to be, at batch 1 or at the largest measured"""

    @property
    def wanted(self) -> tuple[Int8, ...]:
        """The variants to try."""
        return ("onnx-int8-dynamic", "onnx-int8-static") if self.formats == "auto" else self.formats


class Export(Part):
    """What is made of the trained weights."""

    came_later: ClassVar[frozenset[str]] = frozenset({"external_data", "files", "extras", "labels", "serving"})
    most: ClassVar[Mapping[str, int]] = {"labels": MOST_LABELS}

    formats: Literal["auto"] | Annotated[tuple[Format, ...], Field(strict=False, min_length=1)] = (
        "torchscript",
        "onnx",
        "pt2",
    )
    """artifacts of the release; auto: every format that can capture the model, aoti where a C++ compiler is, and the
    reasons of those that cannot; executorch only by name: it needs the extra edge and a largest size of every dynamic
    dimension"""
    serving: Target | None = None
    """function(model), called with the trained model in eval mode; returns the torch.nn.Module that is exported, proven
    and served in its place, such as the model with normalisation before and softmax behind it; see serving-module.md"""
    batch: int = Field(64, ge=2)
    """batch size at which the model is captured; the batch stays dynamic"""
    max_batch: int | None = Field(None, ge=2)
    """largest batch that users will send; no limit when absent, which executorch needs"""
    dynamic: dict[Annotated[str, AfterValidator(_is_dimension)], Dynamic] = Field(default_factory=dict)
    """further dynamic dimensions by name, see below"""
    external_data: Literal["auto", "always"] = "auto"
    """where the weights of the ONNX file are: auto, in it, and above 1.5 GB in model.onnx.data beside it, as a file of
    ONNX holds less than 2 GiB; always, beside it"""
    libraries: tuple[str, ...] = Field((), strict=False)
    """shared libraries with custom operators (TORCH_LIBRARY), relative to the project, that become part of the
    release"""
    files: tuple[Annotated[str, AfterValidator(_is_inside)], ...] = Field((), strict=False)
    """files and folders, relative to the project, that the release has below files/ for whoever serves it, such as
    [tokenizer/, labels.json]; see files-and-labels.md"""
    extras: Target | None = None
    """function(folder), called after training, whose files the release has below files/ too; with a parameter model it
    is given the trained model"""
    labels: tuple[str, ...] = Field((), strict=False)
    """what the columns of the first output are called, in their order, such as [cat, dog]; when absent, what the
    training data has as `classes`, where that is a list of texts that fits"""
    quantize: Literal["none", "auto"] | Quantize = "none"
    """int8 variants beside the formats; auto: with the defaults below"""
    serve: Literal["auto", "none"] | Format | Int8 = "auto"
    """what the release recommends to serve with: auto measures every format at batch 1, 8 and 64 and names the fastest
    for latency and for throughput; a format, that one, measured too; none, nothing is measured unless a gate asks for
    it"""
    threads: int | None = Field(None, ge=1)
    """threads of every runtime while it is measured; those of a rank when absent"""
    validation_samples: int = Field(10_000, ge=1)
    """at most this many validation samples are used to gate artifacts: all there are, or as many drawn by train.seed,
    from each label in proportion where the target is one whole number"""

    @model_validator(mode="after")
    def _no_duplicates(self) -> Self:
        if self.formats != "auto" and len(set(self.formats)) != len(self.formats):
            raise ValueError("each format once")
        return self

    @model_validator(mode="after")
    def _files_once(self) -> Self:
        for name, times in Counter(self.files).items():
            if times > 1:
                raise ValueError(f"each file once in files, and {name} is in {name}")
        if clash := file_above(frozenset(self.files)):
            raise ValueError(f"each file once in files, and {clash[1]} is in {clash[0]}")
        return self

    @field_validator("labels", mode="before")
    @classmethod
    def _texts(cls, labels: Any) -> Any:
        if wrong := wrong_labels(labels):
            raise ValueError(wrong)
        return labels

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if self.max_batch is not None and self.batch > self.max_batch:
            raise ValueError(
                f"export.batch, {self.batch} samples at which the model is captured, no larger than export.max_batch, "
                f"{self.max_batch}"
            )
        return self

    @model_validator(mode="after")
    def _executorch_knows_every_end(self) -> Self:
        if "executorch" in self.wanted:
            ends = {"export.max_batch": self.max_batch}
            ends |= {f"export.dynamic.{name}.max": dimension.max for name, dimension in self.dynamic.items()}
            missing = [key for key, end in ends.items() if end is None]
            if missing:
                raise ValueError(
                    f"{' and '.join(missing)}, the largest size that users will send, with formats: [executorch], "
                    "which plans memory for it"
                )
        return self

    @model_validator(mode="after")
    def _serves_what_it_makes(self) -> Self:
        made = (*self.wanted, *self.int8.wanted) if self.int8 is not None else self.wanted
        if self.serve not in ("auto", "none") and self.serve not in made:
            raise ValueError(f"serve: auto, none or one of what is made ({', '.join(made)}), not {self.serve}")
        if self.int8 is not None and "onnx" not in self.wanted:
            for kind in self.int8.wanted:
                if kind.startswith("onnx"):
                    raise ValueError(f"onnx in export.formats, of which {kind} is made")
        return self

    @property
    def int8(self) -> Quantize | None:
        """What is asked of int8 variants; None when none are tried."""
        if self.quantize == "none":
            return None
        return Quantize() if self.quantize == "auto" else self.quantize

    @model_validator(mode="after")
    def _each_axis_once(self) -> Self:
        taken: dict[tuple[str, int], str] = {}
        for name, dimension in self.dynamic.items():
            for tensor, axes in dimension.axes.items():
                for axis in axes if isinstance(axes, tuple) else (axes,):
                    if (tensor, axis) in taken:
                        raise ValueError(
                            f"one name for axis {axis} of {tensor}, which is both {taken[tensor, axis]} and {name}"
                        )
                    taken[tensor, axis] = name
        return self

    @property
    def wanted(self) -> tuple[Format, ...]:
        """The formats to try."""
        if self.formats == "auto":
            return tuple(kind for kind in get_args(Format) if kind not in OPT_IN)
        return self.formats

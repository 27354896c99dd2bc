"""The `export` part of a job file: which artifacts are made, and which of their dimensions stay dynamic."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from registry.parts import Part

Format = Literal["torchscript", "onnx", "pt2", "aoti"]
Axis = Annotated[int, Field(ge=1)]


def _is_dimension(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("letters, digits and underscores, such as length")
    if name == "batch":
        raise ValueError("another name than batch: the first dimension of every input is dynamic already")
    return name


class Dynamic(Part):
    """A dimension whose size may change from call to call, and where it is in the inputs."""

    axes: dict[str, Axis | Annotated[tuple[Axis, ...], Field(strict=False, min_length=1)]] = Field(
        min_length=1, description="input name: axis, or a list of axes, counted from 0, which is the batch"
    )
    min: int = Field(1, ge=1, description="smallest size that users will send")
    max: int | None = Field(None, ge=1, description="largest size; no limit when absent")

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.max is not None and self.max <= self.min:
            raise ValueError(f"min < max, and {self.min} >= {self.max}")
        return self


class Export(Part):
    """What is made of the trained weights."""

    formats: Literal["auto"] | Annotated[tuple[Format, ...], Field(strict=False, min_length=1)] = Field(
        ("torchscript", "onnx", "pt2"),
        description="artifacts of the release; auto: every format that can capture the model, aoti where a C++ "
        "compiler is, and the reasons of those that cannot",
    )
    batch: int = Field(64, ge=2, description="batch size at which the model is captured; the batch stays dynamic")
    dynamic: dict[Annotated[str, AfterValidator(_is_dimension)], Dynamic] = Field(
        default_factory=dict, description="further dynamic dimensions by name, see below"
    )
    libraries: tuple[str, ...] = Field(
        (),
        strict=False,
        description="shared libraries with custom operators (TORCH_LIBRARY), relative to the project, that become part "
        "of the release",
    )
    serve: Literal["auto", "none"] | Format = Field(
        "auto",
        description="what the release recommends to serve with: auto measures every format at batch 1, 8 and 64 and "
        "names the fastest for latency and for throughput; a format, that one, measured too; none, nothing is measured "
        "unless a gate asks for it",
    )
    threads: int | None = Field(
        None, ge=1, description="threads of every runtime while it is measured; those of a rank when absent"
    )
    validation_samples: int = Field(
        10_000, ge=1, description="at most this many validation samples are used to gate artifacts"
    )

    @model_validator(mode="after")
    def _no_duplicates(self) -> Self:
        if self.formats != "auto" and len(set(self.formats)) != len(self.formats):
            raise ValueError("each format once")
        return self

    @model_validator(mode="after")
    def _serves_what_it_makes(self) -> Self:
        if self.serve not in ("auto", "none") and self.serve not in self.wanted:
            raise ValueError(f"serve: auto, none or one of export.formats ({', '.join(self.wanted)}), not {self.serve}")
        return self

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
        return get_args(Format) if self.formats == "auto" else self.formats

"""What every exporter is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import Tensor, nn

from torchworker.contract import DynamicDim, Project
from torchworker.project.signature import input_specs


class Made(NamedTuple):
    """How one format was made."""

    method: str
    """In words for the report."""
    notes: Sequence[str] = ()
    """What it computes otherwise than the model, on inputs of a corner, in words."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to capture, with example inputs."""

    model: nn.Module
    """In eval mode, its parameters without gradients."""
    inputs: Mapping[str, Tensor]
    """Example inputs in forward's order; every dynamic dimension has a size of at least 2."""
    outputs: Sequence[str]
    """Names of the flattened outputs."""
    dims: Sequence[DynamicDim]
    """The batch and the declared dimensions."""
    project: Project
    external_data: bool = False
    """Whether the weights of ONNX are in a file beside it, however few there are."""

    def signature(self) -> str:
        """Names, dtypes, shapes and ranges of the inputs, as JSON, for runtimes that do not look at them."""
        return json.dumps(
            {
                "inputs": [asdict(spec) for spec in input_specs(self.inputs, self.dims)],
                "dims": {dim.name: [dim.min, dim.max] for dim in self.dims},
            }
        )

    @property
    def folder(self) -> str:
        """Where the user's code is."""
        return self.project.folder

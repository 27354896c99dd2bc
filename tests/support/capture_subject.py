"""A model as capturing gets it; a small net with a batch and a height that may vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchworker.contract import DynamicDim, Project, Reference
from torchworker.exporters.subject import Subject


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        return self.features(picture).relu().mean((2, 3))


def of(model: nn.Module, inputs: Mapping[str, Tensor], dims: Sequence[DynamicDim], folder: str = "/nowhere") -> Subject:
    """A model with one output, and what it is given. folder: of its code."""
    nothing = Reference(target="a:b", where="model.factory")
    return Subject(
        model=model.eval().requires_grad_(False),
        inputs=inputs,
        outputs=["output"],
        dims=dims,
        project=Project(
            name="plain", folder=folder, model=nothing, data=nothing, collate=None, loss="mse_loss", metrics=[]
        ),
    )


def subject(*, batch: int | None = 20, height: int | None = 24) -> Subject:
    """Net, with batches of 1 to `batch` and pictures 3 to `height` high."""
    torch.manual_seed(0)
    dims = [
        DynamicDim(name="batch", min=1, max=batch, axes={"picture": (0,)}),
        DynamicDim(name="height", min=3, max=height, axes={"picture": (2,)}),
    ]
    return of(Net(), {"picture": torch.randn(8, 3, 9, 8)}, dims)

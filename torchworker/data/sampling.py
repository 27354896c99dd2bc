"""Which samples an epoch draws, where the job says so: `data.sampler`."""

from __future__ import annotations

import numbers
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, Sampler, WeightedRandomSampler

from torchworker.contract import Project
from torchworker.process.failure import UserError, as_user_error
from torchworker.project.opened import counts_as_data
from torchworker.project.randomness import OwnRandom
from torchworker.project.user_code import describe_tensor, made_by


class Draws:
    """The samples of each epoch as a sampler of the user's gives them, for all ranks together.

    Its random draws come from a state of their own that depends on seed and epoch alone: each rank sees the same draws,
    and sees them again after a resume. A sampler with a method `set_epoch` is told the epoch first.
    """

    def __init__(self, dataset: Dataset[Any], project: Project, seed: int) -> None:
        """
        Args:
            dataset: what the sampler is made for.
            project: names the sampler.
            seed: of the job.

        Raises:
            UserError: the sampler cannot be made, gives what are no places of samples, or draws from generators of its
                own.
        """
        assert project.sampler is not None, "the job has a sampler"
        self._reference, self._project, self._seed = project.sampler, project, seed
        self._named = f"{project.sampler.where}: {project.sampler.target}"
        if isinstance(dataset, IterableDataset):
            raise UserError(f"{self._named}: expected a map-style dataset, of which samples can be drawn, got a stream")
        self._samples = len(dataset)  # type: ignore[arg-type]
        self._sampler = self._made(dataset)
        self.size = self._length()
        """Draws of an epoch."""
        if not torch.equal(self.places(1), self.places(1)):
            raise UserError(
                f"{self._named} gives another order each time that it is asked for the first epoch, so it draws from a "
                "generator of its own, and a run that goes on would see other samples; draw from torch's, Python's or "
                "NumPy's global generators, which are seeded by epoch and alike in all ranks"
            )

    def places(self, epoch: int) -> Tensor:
        """Of the samples of an epoch (from 1) in order: int64 [size]. Raises UserError."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        own = OwnRandom(self._seed * 1_000_003 + epoch)
        with as_user_error(f"{self._named} failed", self._project.folder):
            # One more than there may be: a sampler without an end would never give them all.
            given = own.call(lambda: list(islice(self._sampler, self.size + 1)))
        wrong = next((item for item in given if not _is_place(item) or not 0 <= item < self._samples), None)
        if wrong is not None:
            raise UserError(
                f"{self._named}: expected places of samples, whole numbers from 0 to {self._samples - 1}, got {wrong!r}"
            )
        if len(given) != self.size or not given:
            more = "more" if len(given) > self.size else str(len(given))
            raise UserError(f"{self._named}: its len() says {self.size} draws an epoch, and it gives {more}")
        return torch.tensor(given, dtype=torch.int64)

    def _length(self) -> int:
        try:
            return len(self._sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            raise UserError(f"{self._named}: expected a sampler with a len(), the draws of an epoch") from None

    @counts_as_data
    def _made(self, dataset: Dataset[Any]) -> Sampler[Any]:
        made = made_by(self._reference, self._project, dataset)
        if isinstance(made, DistributedSampler):
            raise UserError(
                f"{self._named} makes a DistributedSampler, which gives each rank a part; expected a sampler of all "
                "samples: the ranks take turns through what it gives"
            )
        return made if isinstance(made, Sampler) else WeightedRandomSampler(self._weights(made), self._samples)

    def _weights(self, made: Any) -> list[float]:
        expected = f"{self._named} must return a torch Sampler, or a weight for each of {self._samples} samples"
        try:
            weights = torch.as_tensor(made, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{expected}; got {type(made).__name__}") from None
        if weights.shape != (self._samples,):
            raise UserError(f"{expected}; got {describe_tensor(weights)}")
        if not bool(torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise UserError(f"{expected}, finite, not negative and not all 0; got {weights.min()} to {weights.max()}")
        found: list[float] = weights.tolist()
        return found


def _is_place(item: Any) -> bool:
    return isinstance(item, numbers.Integral) and not isinstance(item, bool)

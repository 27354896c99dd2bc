"""What a custom loop has returned, kept beside its checkpoints: an error afterwards does not cost the training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from torchworker.contract import WEIGHTS, Entrypoint, TrainRequest
from torchworker.durable import make_folders
from torchworker.project.user_code import build_model
from torchworker.project.weights import load_weights
from torchworker.training.checkpoint import complete, problem_of

RETURNED = "returned"
"""Folder beside the checkpoints."""
ASKED = "asked.json"
"""In it: what was trained."""


def keep_returned(request: TrainRequest, entry: Entrypoint) -> None:
    """Keep the weights that rank 0 has written into the run's folder. Every rank may call it."""
    if dist.get_rank() != 0:
        return
    work = Path(request.checkpoints) / f"{RETURNED}.work"
    # A full disk costs it, not the training.
    with contextlib.suppress(OSError):
        shutil.rmtree(work, ignore_errors=True)
        make_folders(work)
        _link(Path(request.folder) / WEIGHTS, work / WEIGHTS)
        (work / ASKED).write_text(json.dumps(_asked(request, entry)))
        complete(work)


def returned_before(request: TrainRequest, entry: Entrypoint) -> nn.Module | None:
    """The model that the loop returned in an earlier launch of this run; None when it did not. Every rank calls it.

    A loop, arguments, model, data or seed that were changed since make another one.
    """
    kept = Path(request.checkpoints) / RETURNED
    sound: list[Any] = [dist.get_rank() == 0 and kept.exists() and _is_sound(kept, request, entry)]
    dist.broadcast_object_list(sound, 0)
    if not sound[0]:
        return None
    model = build_model(request.project)
    try:
        load_weights(model, kept / WEIGHTS)
    except RuntimeError:
        # The factory's code makes another one now.
        return None
    return model


def _is_sound(kept: Path, request: TrainRequest, entry: Entrypoint) -> bool:
    return not problem_of(kept) and json.loads((kept / ASKED).read_text()) == _asked(request, entry)


def _asked(request: TrainRequest, entry: Entrypoint) -> Any:
    """What the loop was, as JSON gives it back."""
    parts = (entry.function, request.project.model, request.project.data)
    values = [*map(dataclasses.asdict, parts), request.train.seed, request.start]
    return json.loads(json.dumps(values))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

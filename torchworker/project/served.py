"""What is exported, proven and served: the trained model, or the module that `export.serving` makes of it.

Training knows nothing of it. It is made of the model in eval mode and on the CPU, once the weights are loaded, and from
there on stands in the model's place; its inputs are those of `data.raw`, or of `data.factory` where the job has no raw
ones.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from torchworker.contract import Project, Reference
from torchworker.process.failure import UserError
from torchworker.project.answers import same_values
from torchworker.project.kept_state import State, changed, state_of
from torchworker.project.randomness import OwnRandom
from torchworker.project.user_code import (
    batches,
    build_dataset,
    build_model,
    describe_tensor,
    length_of,
    made_by,
    resolve,
    uncompiled,
)

TensorKey = tuple[object, ...]
"""Tells a tensor from every other that is alive."""


def served_project(project: Project) -> Project:
    """The project as who asks what is exported sees it: `model` is what made that, `data` where its inputs are from.

    `build_dataset` and `batches` give raw samples with it, and messages name the keys of the job that are at fault. A
    model cannot be built with it.
    """
    if project.serving is None:
        return project
    if project.raw is None:
        return replace(project, model=project.serving)
    return replace(project, model=project.serving, data=project.raw, collate=None)


def build_served(model: nn.Module, project: Project) -> nn.Module:
    """What is exported, in eval mode: the model itself unless the job has `export.serving`.

    Args:
        model: trained, in eval mode, on the CPU.
        project: names the function.

    Raises:
        UserError: it fails, or returns no module.
    """
    if project.serving is None:
        return model
    made = made_by(project.serving, project, model)
    if not isinstance(made, nn.Module):
        raise UserError(f"{_named(project.serving)} must return a torch.nn.Module, got {type(made).__name__}")
    return uncompiled(made).eval()


def try_serving(model: nn.Module, project: Project) -> nn.Module:
    """What would be exported of a copy of the model as it is now, asked before it is trained.

    Args:
        model: in whichever mode and on any device; stays as it is, and so do random generators.
        project: names the function; the job has one.

    Raises:
        UserError: it cannot be made, is another one when it is made again, or the function changes the model's weights.
    """
    assert project.serving is not None, "asked before"
    made = []
    for seed in range(2):
        trial = _copied(model, project).cpu().eval()
        weights = dict(trial.state_dict())
        before = {name: tensor.clone() for name, tensor in weights.items()}
        made.append(OwnRandom(seed).call(lambda trial=trial: build_served(trial, project)))  # type: ignore[misc]
        if wrong := [name for name, tensor in before.items() if not same_values(tensor, weights[name])]:
            raise UserError(
                f"{_named(project.serving)} changes {wrong[0]} of the model that it is given{_more(wrong)}; what ships "
                "has the weights that were trained: put what comes before and after the model into modules around it"
            )
    if wrong := _different(state_of(made[0]), made[1]):
        raise UserError(
            f"{_named(project.serving)} makes another module each time that it is called on the same model: {wrong[0]} "
            f"differs{_more(wrong)}; weights that are drawn there were never trained: take constants from the data or "
            "a file, and put what has to be trained into model.factory"
        )
    return made[0]


def _copied(model: nn.Module, project: Project) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception:
        # Of a lock, or a tensor in the middle of a graph, there is no copy: as the export does it.
        made = OwnRandom(0).call(lambda: build_model(project))
        made.load_state_dict(model.state_dict())
        return made


def _different(before: State, again: nn.Module) -> list[str]:
    now = state_of(again)
    return [*changed(before, again), *(name for name in before if name not in now)]


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _named(reference: Reference) -> str:
    return f"{reference.where}: {reference.target}"


def require_for_live(project: Project) -> None:
    """Raises UserError unless `data.for_live` can be called as it will be; it is not called."""
    if project.for_live is None:
        return
    function = resolve(project.for_live, project)
    given = {"split": "validation", "files": None, **({"snapshot": ""} if project.snapshot else {})}
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Of what is written in C nothing is known.
        return
    try:
        signature.bind(**given, **project.for_live.args)
    except TypeError as error:
        asked = ", ".join(f"{name}=…" for name in (*given, *project.for_live.args))
        raise UserError(
            f"{_named(project.for_live)} is called as {project.for_live.target.rpartition(':')[2]}({asked}): {error}"
        ) from None


# ---- weights


def weights_of(model: nn.Module) -> dict[TensorKey, str]:
    """Each tensor of the model's state, and the name under which its file has it. Asked before `build_served`, which
    may put the model's parts elsewhere."""
    known: dict[TensorKey, str] = {}
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and tensor.numel():
            known.setdefault(_key(tensor), name)
    return known


def weight_names(exported: nn.Module, known: Mapping[TensorKey, str]) -> dict[str, str]:
    """Name in what is exported to name in the model, of what is the model's own tensor and no copy. known: `weights_of`
    the model."""
    state = {name: tensor for name, tensor in exported.state_dict().items() if isinstance(tensor, Tensor)}
    return {name: known[_key(tensor)] for name, tensor in state.items() if _key(tensor) in known}


def _key(tensor: Tensor) -> TensorKey:
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


# ---- samples


def raw_dataset(dataset: Dataset[Any], split: str, project: Project) -> Dataset[Any] | None:
    """What `data.raw` gives; None where the job has none.

    Args:
        dataset: of the same split, from `data.factory`.
        split: `train` or `validation`.
        project: names both.

    Raises:
        UserError: it cannot be made, or has more or fewer samples.
    """
    if project.raw is None:
        return None
    raw = build_dataset(served_project(project), split)
    sizes = length_of(raw), length_of(dataset)
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"{_named(project.raw)}(split={split!r}) has {sizes[0]:,} samples and {project.data.target} {sizes[1]:,}; "
            "expected the same samples in the same order"
        )
    return raw


def served_batches(
    dataset: Dataset[Any],
    raw: Dataset[Any] | None,
    size: int,
    project: Project,
    chosen: int | Sequence[int] | None = None,
    see: Callable[[Any], object] | None = None,
    order: Callable[[int], Sequence[int]] | None = None,
) -> Iterator[tuple[Any, Tensor]]:
    """Batches of validation samples as what is exported is asked about them.

    Args:
        dataset: from `data.factory`.
        raw: of `raw_dataset`; its items are collated by torch's own function.
        size, chosen, order: as `batches` takes them.
        project: names both.
        see: called with each sample of `dataset`, which is read in step.

    Yields:
        Raw inputs where there are some, and the target that comes with them, each [batch, …].

    Raises:
        UserError: an item cannot be read, or a raw sample is another one, as its label or their number shows.
    """
    if raw is None:
        yield from batches(dataset, size, project, chosen, see, order=order)
        return
    read = Counter[str]()

    def counted(item: Any) -> None:
        read["own"] += 1
        if see is not None:
            see(item)

    own = batches(dataset, size, project, chosen, counted, order=order)
    theirs = batches(raw, size, served_project(project), chosen, lambda _: read.update(["raw"]), order=order)
    for number, (mine, given) in enumerate(itertools.zip_longest(own, theirs)):
        if read["raw"] != read["own"]:
            raise _other_samples(project, f"{read['raw']:,} samples where {project.data.target} has {read['own']:,}")
        places = range(read["own"]) if order is None else order(read["own"])
        _require_same_labels(mine[1], given[1], places[number * size :], project)
        yield given


def _require_same_labels(mine: Tensor, given: Tensor, places: Sequence[int], project: Project) -> None:
    """Whole numbers are labels in both. A number on a scale may be in other units where nothing is normalised."""
    if mine.is_floating_point() or given.is_floating_point() or mine.is_complex() or mine.shape != given.shape:
        return
    wrong = (mine != given).flatten(1).any(1) if mine.dim() > 1 else mine != given
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        targets = [
            str(tensor[row].item()) if tensor[row].numel() == 1 else describe_tensor(tensor[row])
            for tensor in (given, mine)
        ]
        raise _other_samples(
            project, f"target {targets[0]} for sample {places[row]}, where {project.data.target} has {targets[1]}"
        )


def _other_samples(project: Project, gives: str) -> UserError:
    assert project.raw is not None, "asked before"
    return UserError(f"{_named(project.raw)} gives {gives}; expected the same samples in the same order")

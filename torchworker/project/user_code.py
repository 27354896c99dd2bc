"""The user's model, data and loss, rebuilt in a worker process from references. The only importer of user code."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from torchworker.contract import CustomMetric, Project, Reference
from torchworker.process.failure import UserError, as_user_error, describe, is_lost_connection, user_error, user_line
from torchworker.process.phase import building
from torchworker.project.library import as_metric, as_tensors, asks_for
from torchworker.project.metrics import first_output, metric_sum
from torchworker.project.opened import counts_as_code, counts_as_data
from torchworker.project.outputs import mapped, parts_of
from torchworker.project.randomness import OwnRandom

Loss = Callable[[Any, Tensor], Tensor]


def enter(project: Project) -> None:
    """Put the project's folder first on the import path, as `python script.py` in it would."""
    if project.folder not in sys.path:
        sys.path.insert(0, project.folder)


@counts_as_code
def resolve(reference: Reference, project: Project) -> Callable[..., Any]:
    """The callable behind `module:attribute`.

    Raises UserError when the module does not import (with the nested error), the attribute is missing, or
    it is not callable.
    """
    module_name, _, attribute = reference.target.partition(":")
    named = f"{reference.where}: {reference.target}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"{named}: expected a module {module_name!r} in {project.folder} or installed, found none"
            ) from None
        raise user_error(f"{named}: importing {module_name!r} failed", error, project.folder) from error
    except (Exception, SystemExit) as error:
        raise user_error(f"{named}: importing {module_name!r} failed", error, project.folder) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = ", ".join(sorted(name for name in vars(module) if not name.startswith("_"))[:12])
            raise UserError(
                f"{named}: module {module_name!r} ({module.__file__}) has no {part!r}; it has: {public or 'nothing'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{named}: expected something callable, got {type(found).__name__}")
    return typing.cast(Callable[..., Any], found)


@counts_as_code
def _call(reference: Reference, project: Project, **extra: Any) -> Any:
    function = resolve(reference, project)
    arguments = {**extra, **as_tensors(function, reference.args)}
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    what = f"{reference.where}: {reference.target}({shown}) failed"
    with as_user_error(what, project.folder, (Exception, SystemExit)):
        return function(**arguments)


@counts_as_code
def made_by(reference: Reference, project: Project, *given: Any, **defaults: Any) -> Any:
    """What a factory makes of what it is given by position and of the job's arguments, which go before our defaults.

    Raises UserError when it fails.
    """
    factory = resolve(reference, project)
    with as_user_error(f"{reference.where}: {reference.target} failed", project.folder):
        return factory(*given, **{**defaults, **as_tensors(factory, reference.args)})


@building()
def build_model(project: Project) -> nn.Module:
    """The untrained model. Raises UserError unless it is an nn.Module with parameters to train."""
    model = _call(project.model, project)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{project.model.where}: {project.model.target} must return a torch.nn.Module, got {type(model).__name__}"
        )
    model = uncompiled(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{project.model.where}: the model has no parameters to train")
    _unexpand(model)
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model and its parts without torch.compile, which puts `_orig_mod` into the names of weights."""
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    for module in model.modules():
        # Of module.compile().
        module.__dict__.pop("_compiled_call_impl", None)
        own: Any = module.__dict__.get("forward")
        if hasattr(own, "_torchdynamo_orig_callable") and own.__name__ == "forward":
            # torch.compile(self.forward): the class has the original.
            del module.forward
        for name, child in module._modules.items():
            if child is not None and "_orig_mod" in child._modules:
                module._modules[name] = uncompiled(child)
    return model


def _unexpand(model: nn.Module) -> None:
    """Give expanded buffers memory of their own: nothing can be loaded or broadcast into one place for many values."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            plain = buffer.layout == torch.strided and not nn.parameter.is_lazy(buffer)
            if plain and any(size > 1 and step == 0 for size, step in zip(buffer.shape, buffer.stride(), strict=True)):
                setattr(module, name, buffer.contiguous())


@counts_as_data
@building()
def build_dataset(project: Project, split: str) -> Dataset[Any]:
    """The `train` or `validation` dataset: map-style or iterable, not empty, items (inputs, target)."""
    more = {"snapshot": project.snapshot} if project.snapshot else {}
    dataset = _call(project.data, project, split=split, **more)
    asked = f"{project.data.where}: {project.data.target}(split={split!r})"
    if isinstance(dataset, IterableDataset):
        empty = _is_empty_stream(dataset, asked, project)
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        empty = len(dataset) == 0
    else:
        raise UserError(
            f"{asked} must return a map-style dataset (with __len__ and __getitem__) or a torch IterableDataset, got "
            f"{type(dataset).__name__}"
        )
    if empty:
        raise UserError(f"{asked} returned an empty dataset; expected at least one sample")
    return typing.cast(Dataset[Any], dataset)


def _is_empty_stream(dataset: IterableDataset[Any], asked: str, project: Project) -> bool:
    nothing = object()
    with as_user_error(f"{asked}: reading the first item failed", project.folder):
        return next(iter(dataset), nothing) is nothing


def length_of(dataset: Dataset[Any]) -> int | None:
    """Samples of a dataset; None for an iterable one that does not say."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def build_function(
    reference: Reference, project: Project, adapt: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """What a reference to a function means: a class is instantiated with the args, a function is given them.

    adapt: makes what is called of what was found.
    """
    found = resolve(reference, project)
    if inspect.isclass(found):
        found = _call(reference, project)
    elif reference.args:
        found = functools.partial(found, **as_tensors(found, reference.args))
    made = adapt(found) if adapt is not None else found
    if not callable(made):
        raise UserError(f"{reference.where}: {reference.target} must make something callable, got {type(made)}")
    return typing.cast(Callable[..., Any], made)


def build_collate(project: Project, split: str) -> Callable[[list[Any]], Any]:
    """collate(items) -> (inputs, target) of a batch: torch's own, or the one that the job names.

    One with an argument `split` is told of which the items are, `train` or `validation`.
    """
    if project.collate is None:
        return default_collate
    function = build_function(project.collate, project)
    if "split" not in project.collate.args and asks_for(function, "split"):
        function = functools.partial(function, split=split)
    name = f"{project.collate.where}: {project.collate.target}"

    def collate(items: list[Any]) -> Any:
        with as_user_error(f"{name} failed on {len(items)} items", project.folder):
            return function(items)

    return collate


def build_loss(project: Project) -> Loss:
    """loss(outputs, target) -> scalar tensor."""
    if isinstance(project.loss, str):
        return typing.cast(Loss, getattr(nn.functional, project.loss))
    return build_function(project.loss, project)


def split_batch(batch: Any, project: Project) -> tuple[Any, Tensor]:
    """A collated batch as (inputs, target)."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise UserError(
            f"{project.data.where}: each item must be a pair (inputs, target), got {type(batch).__name__}{size}"
        )
    inputs, target = batch
    if not isinstance(target, Tensor):
        raise UserError(
            f"{project.data.where}: the target of an item must collate to one tensor, got {type(target).__name__}"
        )
    return inputs, target


def name_inputs(model: nn.Module, inputs: Any, project: Project) -> dict[str, Tensor]:
    """Inputs by the names of forward's parameters, in forward's order; those with a default may be left out.

    A tensor is the first parameter, a tuple or list is positional, a dict is by name.
    """
    parameters = _parameters(model)
    takes = f"{project.model.where}: forward takes ({', '.join(str(item) for item in parameters.values())})"
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, Mapping):
        unknown = [name for name in inputs if name not in parameters]
        if unknown:
            raise UserError(f"{takes} but the data gives inputs named {sorted(inputs)}")
        named = {name: inputs[name] for name in parameters if name in inputs}
    elif isinstance(inputs, tuple | list):
        if len(inputs) > len(parameters):
            raise UserError(f"{takes} but the data gives {len(inputs)} inputs")
        named = dict(zip(parameters, inputs, strict=False))
    else:
        raise UserError(
            f"{project.data.where}: inputs must be a tensor, a tuple of tensors or a dict of tensors, "
            f"got {type(inputs).__name__}"
        )
    missing = [name for name, item in parameters.items() if item.default is item.empty and name not in named]
    if missing:
        raise UserError(f"{takes} but the data gives only {', '.join(named)}; expected {', '.join(missing)} too")
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{project.data.where}: input {name!r} must be a tensor, got {type(value).__name__}")
    return named


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """What forward takes, by name; not *args and **kwargs, which have no names."""
    return {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def arguments(model: nn.Module, named: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional arguments up to the first parameter that is left out, and the rest by name."""
    positional: list[Tensor] = []
    for name, parameter in _parameters(model).items():
        if name not in named or parameter.kind is parameter.KEYWORD_ONLY:
            break
        positional.append(named[name])
    rest = {name: tensor for position, (name, tensor) in enumerate(named.items()) if position >= len(positional)}
    return tuple(positional), rest


def name_outputs(outputs: Any, project: Project) -> dict[str, Tensor]:
    """Outputs by name, nested ones flattened: `output` for a tensor, `output_0`… for a tuple, the keys of a dict, the
    fields of a dataclass.

    What is inside an output has its name in front: `{"logits": a, "state": (b, c)}` gives logits, state_0 and state_1.
    None, which forward may return in the place of a tensor, is left out.
    """
    named: dict[str, Tensor] = {}
    for name, value in _flattened(outputs, "", project):
        if name in named:
            raise UserError(f"{project.model.where}: two outputs of forward are both called {name!r}; rename one")
        named[name] = value
    if not named:
        raise UserError(f"{project.model.where}: forward must return at least one tensor, got none")
    return named


def _flattened(value: Any, name: str, project: Project) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
        return
    parts = parts_of(value)
    if parts is not None:
        for key, item in parts:
            # A place is no name.
            front = name or ("output" if isinstance(key, int) else "")
            yield from _flattened(item, f"{front}_{key}" if front else str(key), project)
    elif value is not None:
        raise UserError(
            f"{project.model.where}: forward must return tensors, in tuples, lists, dicts or dataclasses if they are "
            f"several, got {type(value).__name__}{f' at {name}' if name else ''}"
        )


def forward(model: nn.Module, inputs: Any, project: Project, call: nn.Module | None = None) -> Any:
    """Call the model on a batch's inputs; a failure becomes one message with shapes and the user's line.

    Args:
        model: names the parameters.
        inputs: a tensor, a tuple or a dict of tensors, each [batch, …].
        project: for messages.
        call: what to call instead of the model itself, such as its DistributedDataParallel wrapper.

    Returns:
        Whatever forward returns.

    Raises:
        UserError: forward fails, or the inputs are not those it takes.
    """
    named = name_inputs(model, inputs, project)
    try:
        args, kwargs = arguments(model, named)
        return (model if call is None else call)(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(f"{name} {describe_tensor(value)}" for name, value in named.items())
        raise user_error(f"{project.model.where}: forward failed on {shapes}", error, project.folder) from error


def copied(outputs: Any) -> Any:
    """What forward gave, in memory of its own: a model may return what it will write the next answer into."""
    return mapped(Tensor.clone, outputs)


def check_labels(target: Tensor, outputs: Tensor, project: Project) -> None:
    """For cross_entropy with class indices: every label must be one of the model's outputs.

    On a GPU an index out of range ends in an assertion of the device that names nothing, so look first.

    Args:
        target: [batch, …] integer; -100 is no label.
        outputs: [batch, classes, …].
        project: names the loss.

    Raises:
        UserError: with the smallest and the largest label.
    """
    if project.loss != "cross_entropy" or target.is_floating_point() or outputs.dim() < 2 or target.numel() == 0:
        return
    classes = outputs.shape[1]
    low, high = (int(value) for value in torch.aminmax(target))
    # -100 is the index that cross_entropy ignores.
    if high >= classes or (low < 0 and bool(((target < 0) & (target != -100)).any())):
        raise UserError(
            f"{project.data.where}: labels must be in 0..{classes - 1} because the model has {classes} outputs, "
            f"got labels from {low} to {high}"
        )


def compute_loss(loss: Loss, outputs: Any, target: Tensor, project: Project, labels: Tensor | None = None) -> Tensor:
    """The scalar loss.

    Args:
        loss: from `build_loss`.
        outputs: what forward gave.
        target: [batch, …], on the device of the outputs.
        project: for messages.
        labels: the target on the CPU, where it is at hand: looking at one on a GPU waits for all that the GPU has to
            do.

    Returns:
        One number as a tensor, with its graph.

    Raises:
        UserError: labels out of range, a failing loss or a wrong result.
    """
    if isinstance(outputs, Tensor):
        check_labels(target if labels is None else labels, outputs, project)
    name = project.loss if isinstance(project.loss, str) else project.loss.target
    try:
        value = loss(outputs, target)
    except Exception as error:
        raise UserError(
            f"train.loss: {name}(outputs {_shown(outputs)}, target {describe_tensor(target)}) failed: "
            f"{describe(error)}{user_line(error, project.folder)}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise UserError(f"train.loss: {name} must return one number as a tensor, got {_shown(value)}")
    return value


def backward(value: Tensor, project: Project) -> None:
    """Gradients of a loss; a failure is the user's unless another rank went away."""
    try:
        value.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if is_lost_connection(error):
            raise
        raise user_error("train.loss: its gradient cannot be computed", error, project.folder) from error


def require_gradients(model: nn.Module, project: Project) -> None:
    """After one backward: every parameter to train took part. DistributedDataParallel waits for all of them."""
    inner = model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model
    unused = [name for name, item in inner.named_parameters() if item.requires_grad and item.grad is None]
    if unused:
        raise UserError(
            f"{project.model.where}: the loss does not depend on {', '.join(unused[:5])}"
            f"{f' and {len(unused) - 5} more' if len(unused) > 5 else ''}; every parameter must take part in every "
            "step: use it in forward, remove it, or freeze it (train.freeze, or requires_grad_(False)); for a "
            "library's model that has some it never uses, train.find_unused_parameters: true"
        )


def call_metric(metric: CustomMetric, outputs: Tensor, target: Tensor, project: Project) -> float:
    """A metric of the user's own over all samples. What it draws at random is the same each time.

    Args:
        metric: which.
        outputs, target: on the CPU, [samples, …].
        project: for messages.

    Raises:
        UserError: it fails, or gives no number.
    """
    where = f"{metric.reference.where}: {metric.reference.target}"
    shapes = f"(outputs {describe_tensor(outputs)}, target {describe_tensor(target)})"
    function = build_function(metric.reference, project, as_metric)
    with as_user_error(f"{where}{shapes} failed", project.folder):
        return float(OwnRandom(0).call(lambda: function(outputs, target)))


def try_metrics(outputs: Any, target: Tensor, project: Project) -> None:
    """Each metric of the job once, on one batch. Raises UserError for one that cannot be computed on these shapes.

    Args:
        outputs: what forward gave; metrics see its first tensor, [batch, …].
        target: [batch, …].
        project: names the metrics.
    """
    for name in project.metrics:
        try:
            metric_sum(name, first_output(outputs), target)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise UserError(
                f"metrics: {name} cannot be computed on outputs {_shown(outputs)} and target "
                f"{describe_tensor(target)}: {describe(error)}"
            ) from error
    for metric in project.custom_metrics:
        call_metric(metric, first_output(outputs).cpu(), target.cpu(), project)


def describe_tensor(tensor: Tensor) -> str:
    """`float32 [64, 1, 8, 8]`."""
    return f"{dtype_name(tensor)} {list(tensor.shape)}"


def _shown(value: Any) -> str:
    return describe_tensor(value) if isinstance(value, Tensor) else type(value).__name__


def dtype_name(tensor: Tensor) -> str:
    """Without the torch prefix: `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


class _Chosen(IterableDataset[Any]):
    """Samples of a stream by their place, up to the last of them."""

    def __init__(self, dataset: IterableDataset[Any], places: Sequence[int]) -> None:
        self._dataset, self._places = dataset, places

    def __iter__(self) -> Iterator[Any]:
        wanted = iter(self._places)
        place = next(wanted, None)
        for position, item in enumerate(self._dataset):
            if place is None:
                return
            if position == place:
                yield item
                place = next(wanted, None)


def batches(
    dataset: Dataset[Any],
    size: int,
    project: Project,
    chosen: int | Sequence[int] | None = None,
    see: Callable[[Any], object] | None = None,
    split: str = "validation",
    order: Callable[[int], Sequence[int]] | None = None,
) -> Iterator[tuple[Any, Tensor]]:
    """Batches of (inputs, target), for reference data.

    Args:
        dataset: of one split.
        size: samples of a batch; the last may be smaller.
        project: says how to collate.
        chosen: the first so many samples, or those at these places, ascending; None for all.
        see: called with each sample before it is collated, in the dataset's order.
        split: of which the dataset is, for the collate function.
        order: of so many samples, which comes first, second, …: all are read in the dataset's order, and then put into
            batches. None for the dataset's.

    Yields:
        Inputs as the data gives them and the target, each [batch, …], on the CPU.

    Raises:
        UserError: an item cannot be read, or is no pair.
    """
    from torch.utils.data import DataLoader, Subset

    places = range(chosen) if isinstance(chosen, int) else chosen
    of: Dataset[Any] = dataset
    if isinstance(dataset, IterableDataset) and places is not None:
        of = _Chosen(dataset, places)
    elif isinstance(chosen, int):
        of = Subset(dataset, range(min(chosen, len(dataset))))  # type: ignore[arg-type]
    elif places is not None:
        of = Subset(dataset, places)
    collate = build_collate(project, split)

    def seen(items: list[Any]) -> list[Any]:
        for item in items if see is not None else ():
            see(item)  # type: ignore[misc]
        return items

    with as_user_error(f"{project.data.where}: reading an item failed", project.folder):
        if order is None:
            for batch in DataLoader(of, batch_size=size, collate_fn=lambda items: collate(seen(items))):
                yield split_batch(batch, project)
            return
        read = [item for items in DataLoader(of, batch_size=size, collate_fn=seen) for item in items]
        places_of = order(len(read))
        for start in range(0, len(read), size):
            yield split_batch(collate([read[place] for place in places_of[start : start + size]]), project)

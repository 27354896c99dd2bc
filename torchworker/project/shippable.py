"""What a model has to be like to be shipped, asked before it is trained: outputs that hold, and the same each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchworker import situations
from torchworker.contract import Project
from torchworker.process.failure import UserError
from torchworker.project.kept_state import State, changed, place_of, refusal, saved, state_of
from torchworker.project.user_code import copied, describe_tensor, forward, name_inputs, name_outputs
from torchworker.project.watch import Place, watched


@torch.no_grad()
def require_shippable(model: nn.Module, inputs: Any, project: Project, formats: Sequence[str]) -> Any:
    """What forward gives on a batch, if artifacts can give the same.

    Args:
        model: in eval mode.
        inputs: of one batch as the data gives them, on the model's device.
        project: for messages.
        formats: that the job asks for by name.

    Returns:
        Whatever forward returns.

    Raises:
        UserError: an output is sparse or complex, has not the batch as its first dimension, or the first has none; two
            calls on the same inputs differ, or change inputs or buffers; or a format cannot hold the model.
    """
    given = name_inputs(model, inputs, project)
    before = {name: tensor.clone() for name, tensor in given.items()}
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        # Its first call makes the parameters of a LazyModule; that is no state that changes.
        forward(model, inputs, project)
    state = state_of(model)
    outputs = copied(forward(model, inputs, project))
    named = name_outputs(outputs, project)
    _require_dense(named, project)
    for name, tensor in before.items():
        if not _close(tensor, given[name]):
            raise UserError(
                f"{project.model.where}: forward changes its input {name!r} in place, which exported formats do not "
                "do; clone it first"
            )
    _require_settled(model, state, given, project)
    _require_batch(model, given, named, project)
    _require_same(model, inputs, named, project, state)
    for kind in formats:
        if why := cannot_hold(kind, model, given, named):
            raise UserError(f"{project.model.where}: {why}, or leave {kind} {situations.NOT_SHIPPABLE}")
    return outputs


def _require_settled(model: nn.Module, before: State, given: Mapping[str, Tensor], project: Project) -> None:
    """Raises UserError where forward goes on changing what is saved: a buffer may be filled on its first use.

    before: the state before the first call on the inputs that are given.
    """
    first = changed(before, model)
    if limited := _learnt_rows_with_max_norm(model):
        raise refusal(model, limited, given, project)
    if not first:
        return
    now = state_of(model)
    with suppress(UserError):
        # Other samples in each place, so that what was last seen is not taken for what is settled.
        forward(model, {name: tensor.roll(1, 0) for name, tensor in given.items()}, project)
        forward(model, given, project)
    parameters = {name for name, _ in model.named_parameters()}
    # A row of an embedding that is shortened at its look-up changes no more, and others will.
    going_on = [name for name in first if name in parameters] or changed(now, model)
    if names := saved(model, going_on):
        raise refusal(model, names, given, project)


def _learnt_rows_with_max_norm(model: nn.Module) -> list[str]:
    """Weights that look-ups shorten: untrained rows may all be short enough, and trained ones will not stay so."""
    return [
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.max_norm is not None
        and module.weight.requires_grad
    ]


def _require_dense(outputs: Mapping[str, Tensor], project: Project) -> None:
    """First: little can be asked of any other layout."""
    for name, tensor in outputs.items():
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise UserError(
                f"{project.model.where}: output {name!r} of forward is a tensor of layout {layout}, which neither "
                "exported formats nor what serves models have; return its to_dense()"
            )


def _require_batch(
    model: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], project: Project
) -> None:
    """Raises UserError for an output that is neither one row a sample nor one number of the whole batch."""
    rows = len(next(iter(inputs.values())))
    found = {rows: outputs}
    if rows > 1:
        try:
            one = forward(model, {name: tensor[:1] for name, tensor in inputs.items()}, project)
            found[1] = name_outputs(one, project)
        except (UserError, IndexError):
            # Inputs may belong together in ways that cutting breaks.
            pass
    if 1 in found and found[1].keys() != outputs.keys():
        raise UserError(
            f"{project.model.where}: forward returns {_listed(outputs)} for a batch of {rows} and "
            f"{_listed(found[1])} for one sample; exported formats return the same tensors whatever they are asked"
        )
    mistakes = []
    for position, (name, tensor) in enumerate(outputs.items()):
        what = f"{project.model.where}: output {name!r} of forward"
        sizes = (size for size, named in found.items() if name in named and named[name].shape[:1] != (size,))
        number = all(named[name].dim() == 0 for named in found.values() if name in named)
        if number and position == 0:
            mistakes.append(
                f"{what} is one number of the whole batch; expected the batch as the first dimension of the first "
                "output, of which metrics and gates are computed: return it after what has a row for each sample, or "
                "in training only (if self.training)"
            )
        elif number and not tensor.is_complex():
            # An auxiliary loss: it is compared for the same batch, and no server puts requests together.
            continue
        elif (size := next(sizes, None)) is not None:
            mistakes.append(
                f"{what} is {describe_tensor(found[size][name])} for a batch of {size}; expected the batch as the "
                "first dimension of every output: move it there (transpose), or return in training only (if "
                "self.training) what has none"
            )
        elif tensor.is_complex():
            mistakes.append(
                f"{what} is {describe_tensor(tensor)}, and neither ONNX nor what serves models has complex numbers; "
                "return torch.view_as_real of it, which has the real and the imaginary part as its last dimension"
            )
    if mistakes:
        raise UserError("\n".join(mistakes))


def _require_same(model: nn.Module, inputs: Any, first: Mapping[str, Tensor], project: Project, before: State) -> None:
    """Raises UserError for a difference that no rounding explains; the export asks for every bit.

    before: the state before the first call.
    """
    second = name_outputs(forward(model, inputs, project), project)
    if first.keys() != second.keys():
        raise UserError(
            f"{project.model.where}: forward returns {_listed(first)}, and {_listed(second)} when it is asked again; "
            "exported formats return the same tensors each time"
        )
    different = next((name for name, tensor in first.items() if not _close(tensor, second.get(name))), None)
    if different is None:
        return
    what = (
        f"{project.model.where}: output {different!r} of forward differs between two calls on the same inputs in eval "
        "mode"
    )
    watch = watched(model, inputs, project)
    draws = watch.draws if watch is not None else []
    if not draws and (names := changed(before, model)):
        # It is not saved, or it would have been refused before.
        where = place_of(model, names[0], inputs, project)
        raise UserError(
            f"{what}: forward changes the buffer {names[0]!r}{where and f', {where}'}; an exported model must not keep "
            "state between calls: change it in training only (if self.training), or take it as an input and return it "
            "as an output"
        )
    if not draws:
        raise UserError(
            f"{what}; a model with randomness or state in forward cannot be proven equal to its export: take it out, "
            "or keep it to training (if self.training)"
        )
    place = next((place for place in draws if place.dropout), draws[0])
    if not place.dropout:
        raise UserError(
            f"{what}: it draws random numbers ({place}); draw them in training only (if self.training), or take them "
            "as an input"
        )
    raise UserError(f"{what}: {situations.DROPOUT} ({place}); {_way_out(place)}")


def _listed(outputs: Mapping[str, Tensor]) -> str:
    return f"{len(outputs)} {'tensor' if len(outputs) == 1 else 'tensors'} ({', '.join(outputs)})"


def _way_out(place: Place) -> str:
    if hasattr(nn, place.kind) and issubclass(getattr(nn, place.kind), nn.modules.dropout._DropoutNd):
        return f"{place.module} is in training mode although the model is not: leave train() and eval() to the loop"
    if "scaled_dot_product" in place.line:
        return "give dropout_p=0.0 unless self.training"
    return "functional dropout does not follow eval(): pass training=self.training to it, or use nn.Dropout"


def _close(first: Tensor, second: Tensor | None) -> bool:
    if second is None or first.shape != second.shape:
        return False
    if first.is_floating_point():
        return torch.allclose(first.double(), second.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
    return torch.equal(first, second)


def cannot_hold(kind: str, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> str:
    """Why a format cannot hold a model, and what to change, as far as that is known without capturing it.

    Args:
        kind: the format.
        model: whose weights count.
        inputs, outputs: of one batch, by name.

    Returns:
        Words, empty when nothing speaks against it.
    """
    if kind != "onnx":
        return ""
    if twice := [name for name in outputs if name in inputs]:
        return (
            f"output {twice[0]!r} of forward has the name of an input, and in an ONNX file each name stands once; "
            "rename it in what forward returns"
        )
    for path, module in model.named_modules():
        multiplies = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        if multiplies and module.weight.dtype == torch.bfloat16:
            return (
                f"the weight of {path or 'the model'} ({type(module).__name__}) is bfloat16, and ONNX Runtime's CPU "
                "provider has no MatMul, Gemm or Conv for it; make the model float32 in model.factory (.float())"
            )
    for side, tensors, way in (
        ("input {!r}", inputs, "let the data give float32 and turn it into bfloat16 in forward"),
        ("output {!r} of forward", outputs, "return it as float32 (.float())"),
    ):
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16:
                return (
                    f"{side.format(name)} is {describe_tensor(tensor)}, which NumPy, and so ONNX Runtime, does not "
                    f"have; {way}"
                )
    return ""

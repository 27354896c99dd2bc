"""The reference data that artifacts are held against: what the model itself gives, in float32 and in float64."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchworker.contract import GOLDEN, PLACES, PROBES, VALIDATION, ExportRequest, Project, Reading, TensorSpec
from torchworker.data.fingerprint import Fingerprint
from torchworker.data.groups import SampleGroups
from torchworker.parity.asking import complete, complete_among_noise, require_no_memory, require_repeatable
from torchworker.parity.probes import (
    BATCH_SIZES,
    BATCHES,
    LENGTHS,
    POOL,
    SAMPLES,
    SIZES,
    Inputs,
    Probe,
    probes,
    refusals,
    singles,
)
from torchworker.parity.rule import compare_tensors
from torchworker.parity.tables import tables_of
from torchworker.process.failure import UserError, describe
from torchworker.process.fork import ChildDiedError, ChildTimeoutError, CrashNote, run_in_fork
from torchworker.project.answers import Answers, roundoff_of
from torchworker.project.metrics import joined as filled_up
from torchworker.project.metrics import without
from torchworker.project.served import served_batches, served_project
from torchworker.project.signature import dims_of, input_specs, require_alike
from torchworker.project.user_code import forward, name_inputs, name_outputs
from torchworker.project.weights import save_tensors

LABELS = "labels"
"""In VALIDATION: the target with FILLED where the loss ignores a label; absent where it ignores none."""
GROUP = "group"
"""In VALIDATION: the number of each sample's group, [samples] int64; absent where the job names no groups."""
NAMED = 4
"""Declared sizes that the model refuses are told by name up to this many."""
ROUNDOFF = "roundoff"
"""Of `roundoff_of` the model: in GOLDEN's header, and in VALIDATION as a number; absent where it is 0."""
SIZE = "size"
"""In VALIDATION, before the name of a tensor whose batches differ in shape: the sizes that each sample has behind its
batch, [samples, dimensions - 1] int64. The tensor is filled up at the end; absent where all have one shape."""
ASKED, SECONDS = "asked", "seconds"
"""In VALIDATION: of how many samples, from the first, it has the model's answers, and how long these took."""
ROUNDOFFS = (2.0**-8, 2.0**-11)
"""Of bfloat16 and float16. A file from a bucket may not say another one, which would loosen the rule."""
REFUSAL_SECONDS = 60.0
"""The model's answer to an input that it should refuse takes at most this long."""


def require_trained(model: nn.Module, probe: Path, project: Project) -> None:
    """The model rebuilt from its weights must give what the trained one gave at the end of training."""
    from safetensors.torch import load_file

    stored = load_file(probe)
    inputs = {name.removeprefix("input."): tensor for name, tensor in stored.items() if name.startswith("input.")}
    inputs = {name: inputs[name] for name in name_inputs(model, inputs, project)}
    outputs = name_outputs(forward(model, inputs, project), project)
    answers = Answers(model, project)
    exact = answers.exact(inputs)
    perturbed = answers.perturbed(inputs) if not exact else {}
    for name, tensor in outputs.items():
        # The stored outputs are what is checked: the rounding that is allowed is the rebuilt model's own.
        reference = exact.get(name), perturbed.get(name)
        outcome = compare_tensors(stored[f"output.{name}"], tensor, *reference, roundoff=roundoff_of(model))
        if not outcome.passed:
            raise UserError(
                f"export: rebuilt from its weights, the model gives other outputs than when it was trained ({name}: "
                f"{outcome.note}); forward uses something that is neither "
                "a parameter nor a persistent buffer, or its code was changed since: register_buffer it, or make it "
                "from a fixed seed"
            )


def enlarged(named: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Repeat a short batch up to the size of capture, so that a small validation set still exports at it."""
    enlarged = {}
    for name, tensor in named.items():
        repeats = -(-batch // tensor.shape[0])
        enlarged[name] = torch.cat([tensor] * repeats)[:batch].contiguous()
    return enlarged


def golden_sizes(batch: int, largest: int | None) -> list[int]:
    """Batch sizes that artifacts are compared at: one, the one of capture, and the largest, or a larger odd one."""
    return sorted({1, batch, largest or 2 * batch + 1})


def asking_order(count: int, seed: int) -> list[int]:
    """Places of so many samples in the order in which they are asked: those that were asked when time is up are then a
    random sample of all, which neighbours in a file are not."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def write_reference(
    request: ExportRequest,
    model: nn.Module,
    named: Mapping[str, Tensor],
    dataset: Dataset[Any],
    independence: str = "",
    raw: Dataset[Any] | None = None,
) -> tuple[str, Reading]:
    """Three files; returns in words what they were made with, and which validation samples they hold.

    `golden.safetensors`: inputs, eager outputs and, where the model allows, float64 outputs, per batch size;
    `validation.safetensors`: inputs and targets for the quality gate, and answers for as many as `parity_seconds` is
    enough for; `probes.safetensors`: every other question
    with the model's answers (see `read_probes`). Tensor names are `batch_<n>.input.<name>`, `batch_<n>.eager.<name>`,
    `batch_<n>.float64.<name>`; `input.<name>`, `eager.<name>`, `float64.<name>`, `moved.<name>`, `tied.<name>` and
    `target`, and `labels` where the target has labels that no metric of ours counts, `group` where the job says in
    which groups samples come, `size.<name>` where the batches of a tensor differ in shape.

    Args:
        request: says where to, at which batch sizes and of how many validation samples.
        model: in eval mode, on the CPU.
        named: the batch of capture by input, [batch, …].
        dataset: the validation split.
        independence: of `require_independent`, which goes with the probes.
        raw: of `raw_dataset`: the same samples as the model takes them; None where `dataset` gives them so.

    Raises:
        UserError: forward keeps state, writes into its inputs, or fails on the user's own data.
    """
    project, folder = served_project(request.project), Path(request.folder)
    answers = Answers(model, project)
    golden = []
    for size in golden_sizes(request.batch, request.max_batch):
        batch = enlarged(named, size) if size > request.batch else {name: t[:size] for name, t in named.items()}
        golden.append(complete(answers, Probe(name=f"batch_{size}", group=BATCHES, inputs=batch)))
        require_repeatable(answers, golden[-1])
    if answers.fixed_precision:
        golden = [
            replace(probe, exact={}, perturbed=probe.perturbed or answers.perturbed(probe.inputs)) for probe in golden
        ]
    stored: dict[str, Tensor] = {}
    for probe in golden:
        for part, tensors in (("input", probe.inputs), ("eager", probe.eager or {}), ("float64", probe.exact)):
            stored |= {f"{probe.name}.{part}.{name}": tensor for name, tensor in tensors.items()}
    roundoff = roundoff_of(model)
    save_tensors(stored, folder / GOLDEN, metadata={ROUNDOFF: repr(roundoff)} if roundoff else None)
    pool, read = _write_validation(request, answers, dataset, raw)
    asked = [replace(probe, inputs={}, eager={}, exact={}) for probe in golden]
    asked += [complete(answers, probe) for probe in singles(pool, answers.eager, project.folder)]
    dims = dims_of(named, request.dynamic, project, request.max_batch)
    unasked: dict[str, str] = {}
    for probe in probes(pool, dims, tables_of(answers, pool)):
        try:
            asked.append(complete_among_noise(answers, probe))
        except UserError as mistake:
            # Out of the model's domain (a negative length, an empty batch): no artifact is asked either.
            if probe.group == LENGTHS:
                # Declared, so it is said: the range is wrong, or cutting has parted what belongs together.
                unasked[probe.name] = describe(mistake.__cause__ or mistake).splitlines()[0][:200]
    require_no_memory(answers, golden[-1])
    signature = {spec.name: spec for spec in input_specs(named, dims)}
    refused, hung = _refused(answers, list(refusals(pool, signature, dims)))
    _write_probes([*asked, *refused], [*_in_words(unasked), *hung], independence, folder / PROBES)
    if answers.fixed_precision:
        return "eager, with the rounding of weights and inputs; the model does not run in float64", read
    return "eager, checked against float64", read


def _in_words(unasked: Mapping[str, str]) -> list[str]:
    """The first sizes by themselves, the rest counted. unasked: question to what the model said."""
    told = [f"{name}, which the model refuses itself ({refusal})" for name, refusal in unasked.items()]
    return [*told[:NAMED], f"{len(told) - NAMED} more such sizes"] if len(told) > NAMED + 1 else told


def _refused(answers: Answers, questions: Sequence[Probe]) -> tuple[list[Probe], list[str]]:
    """The model's answers to inputs that it should refuse, and what could not be asked, with the reason.

    Each is asked in a fork, which may die of it: then the model has no answer, and no artifact is asked. A fork that
    hangs waits for a thread of the user's code, which only this process has; the others would too.
    """
    asked: list[Probe] = []
    for position, probe in enumerate(questions):
        try:
            eager, error = run_in_fork(partial(_answer_or_error, answers, probe.inputs), CrashNote(), REFUSAL_SECONDS)
        except ChildDiedError:
            continue
        except ChildTimeoutError as hung:
            why = f"in a process of its own the model gives {hung}"
            return asked, [f"{question.name} ({why})" for question in questions[position:]]
        asked.append(replace(probe, eager=eager, error=error))
    return asked, []


def _answer_or_error(answers: Answers, inputs: Mapping[str, Tensor]) -> tuple[Inputs | None, str]:
    try:
        return answers.eager(inputs), ""
    except UserError as error:
        return None, describe(error.__cause__ or error)


def _write_probes(asked: Sequence[Probe], unasked: Sequence[str], independence: str, path: Path) -> None:
    """Tensors `<probe>/<part>/<name>`; the list of probes, what was not asked, and the line on independence in the
    file's metadata, lists as JSON."""
    tensors: dict[str, Tensor] = {}
    listed = []
    for probe in asked:
        parts = {
            "input": probe.inputs, "eager": probe.eager or {}, "float64": probe.exact, "moved": probe.perturbed,
            "tied": probe.tied,
        }  # fmt: skip
        for part, named in parts.items():
            tensors |= {f"{probe.name}/{part}/{name}": tensor for name, tensor in named.items()}
        listed.append(
            {
                "name": probe.name,
                "group": probe.group,
                "declared": probe.declared,
                "touched": list(probe.touched),
                "error": probe.error,
            }
        )
    told = {"probes": json.dumps(listed), "unasked": json.dumps(list(unasked)), "independence": independence}
    save_tensors(tensors, path, metadata=told)


def read_unasked(folder: Path) -> list[str]:
    """Questions that could not be asked of the model, and so of no artifact, with the reason."""
    from safetensors import safe_open

    with safe_open(folder / PROBES, framework="pt") as asked:
        told: list[str] = json.loads(asked.metadata()["unasked"])
    return told


def read_independence(folder: Path) -> str:
    """Whether the model's answers depend on the other samples of a batch, in words; empty where nobody asked."""
    from safetensors import safe_open

    with safe_open(folder / PROBES, framework="pt") as asked:
        return str(asked.metadata().get("independence", ""))


def read_probes(folder: Path) -> list[Probe]:
    """Every probe with the model's answers, the batches of capture first."""
    from safetensors import safe_open

    with safe_open(folder / PROBES, framework="pt") as asked:
        listed = json.loads(asked.metadata()["probes"])
    golden, parts = _parts(folder / GOLDEN, "."), _parts(folder / PROBES, "/")
    roundoff = _read_roundoff(folder)
    return [
        _probe({**item, "roundoff": roundoff}, golden.get(item["name"], {}) | parts.get(item["name"], {}))
        for item in listed
    ]


def read_golden(folder: Path, asked: Path | None) -> list[Probe]:
    """The batches of capture with the model's answers, the smallest first.

    Args:
        folder: of a release, with its golden outputs.
        asked: the file of probes, which has the model's answers after everything was perturbed by its rounding, for
            models without float64, and those with equal values in another order. They widen limits only, so it need
            not come from the bucket.
    """
    more = _parts(asked, "/") if asked is not None else {}
    roundoff = _read_roundoff(folder)
    found = [
        _probe(
            {"name": name, "group": BATCHES, "roundoff": roundoff},
            parts | {part: more.get(name, {}).get(part, {}) for part in ("moved", "tied")},
        )
        for name, parts in _parts(folder / GOLDEN, ".").items()
    ]
    return sorted(found, key=lambda probe: probe.size)


def _read_roundoff(folder: Path) -> float:
    """Of `roundoff_of` the model, as the golden outputs say; 0 where they say nothing or no such number."""
    from safetensors import safe_open

    with safe_open(folder / GOLDEN, framework="pt") as golden:
        said = (golden.metadata() or {}).get(ROUNDOFF, "")
    return next((known for known in ROUNDOFFS if said == repr(known)), 0.0)


def _parts(path: Path, separator: str) -> dict[str, dict[str, Inputs]]:
    """The file's tensors by probe, part (`input`, `eager`, `float64`, `moved`, `tied`) and name."""
    from safetensors.torch import load_file

    parts: dict[str, dict[str, Inputs]] = {}
    for key, tensor in load_file(path).items():
        probe, part, name = key.split(separator, 2)
        parts.setdefault(probe, {}).setdefault(part, {})[name] = tensor
    return parts


def _probe(item: Mapping[str, Any], parts: Mapping[str, Inputs]) -> Probe:
    """item: what `_write_probes` lists of it."""
    return Probe(
        **{**item, "touched": tuple(item.get("touched", ()))},
        inputs=parts["input"],
        eager=None if item.get("error") else parts["eager"],
        exact=parts.get("float64", {}),
        perturbed=parts.get("moved", {}),
        tied=parts.get("tied", {}),
    )


def validation_key(part: str, name: str, start: int) -> str:
    """Where VALIDATION has the model's answer to the batch of validation samples from `start` on."""
    return f"{part}.{name}/{start}"


def validation_batches(
    validation: Mapping[str, Tensor], inputs: Sequence[TensorSpec], batch: int, outputs: Sequence[str] = ()
) -> Iterator[tuple[Probe, Tensor]]:
    """The samples of VALIDATION as an artifact is asked about them.

    Args:
        validation: the file's tensors.
        inputs: of the artifact, in the order of its signature.
        batch: samples of a call: as many as the reference outputs were made with, as a model may look across its batch.
        outputs: those of which the model's own answers are wanted.

    Yields:
        A probe, its inputs [batch, …] and contiguous; targets [batch, …] for the metrics that need no user code.
    """
    labels = LABELS if LABELS in validation else "target"
    for part in _calls(validation, batch):
        start, target = part.start, _rows(validation, labels, part)
        keys = {
            kind: {name: validation_key(kind, name, start) for name in outputs}
            for kind in ("eager", "float64", "moved", "tied")
        }
        answers = {
            kind: {name: validation[key] for name, key in named.items() if key in validation}
            for kind, named in keys.items()
        }
        yield (
            Probe(
                name=f"samples {start} to {start + len(target)}",
                group=SAMPLES,
                inputs={spec.name: _rows(validation, f"input.{spec.name}", part).contiguous() for spec in inputs},
                eager=answers["eager"],
                exact=answers["float64"],
                perturbed=answers["moved"],
                tied=answers["tied"],
                roundoff=float(validation.get(ROUNDOFF, 0.0)),
            ),
            target,
        )


def asked_of(validation: Mapping[str, Tensor]) -> int:
    """How many samples of VALIDATION have the model's answers: the first ones, or all in a file of before."""
    return int(validation.get(ASKED, len(validation["target"])))


def _calls(validation: Mapping[str, Tensor], batch: int) -> Iterator[slice]:
    """Samples that are asked together: of one shape, and at most so many."""
    count = len(validation["target"])
    sizes = [tensor for key, tensor in validation.items() if key.startswith(f"{SIZE}.")]
    shapes = torch.cat([torch.zeros(count, 1, dtype=torch.int64), *sizes], dim=1)
    changes = (shapes[1:] != shapes[:-1]).any(dim=1).nonzero()[:, 0] + 1
    starts = sorted({*range(0, count, batch), *changes.tolist()})
    for start, end in zip(starts, [*starts[1:], count], strict=False):
        yield slice(start, end)


def _rows(validation: Mapping[str, Tensor], key: str, part: slice | Tensor) -> Tensor:
    """Samples of a tensor of VALIDATION, as long as the longest of them was in its batch."""
    rows = validation[key][part]
    sizes = validation.get(f"{SIZE}.{key}")
    return rows if sizes is None else rows[(slice(None), *(slice(int(size)) for size in sizes[part].amax(0)))]


def put_together(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Batches by name, `target` among them, as VALIDATION has them: with SIZE where their shapes differ."""
    joined: dict[str, Tensor] = {}
    for name, batched in parts.items():
        joined[name], sizes = _put_together(batched)
        if sizes is not None:
            joined[f"{SIZE}.{name}"] = sizes
    if f"{SIZE}.target" in joined:
        joined["target"] = filled_up(parts["target"])
    return joined


def _put_together(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Batches [n, …] as one tensor, filled up at the end with 0, and each sample's sizes where batches differ."""
    shapes = [part.shape[1:] for part in parts]
    if len(set(shapes)) == 1:
        return torch.cat(list(parts)).contiguous(), None
    whole = parts[0].new_zeros(sum(map(len, parts)), *(max(sizes) for sizes in zip(*shapes, strict=True)))
    for start, part in zip(itertools.accumulate(map(len, parts), initial=0), parts, strict=False):
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
    return whole, torch.tensor([list(shape) for part, shape in zip(parts, shapes, strict=True) for _ in part])


def other_batches(samples: Sequence[Probe], taken: Sequence[int], largest: int | None) -> Iterator[Probe]:
    """Validation samples in batches of other sizes, held row by row against what the model said in its own batches.

    Args:
        samples: of `validation_batches`, with answers whose first dimension is the batch.
        taken: sizes that are asked anyway.
        largest: batch that the signature allows; None for no limit.
    """
    shapes = [{name: tensor.shape[1:] for name, tensor in probe.inputs.items()} for probe in samples]
    alike = [probe for probe, shape in zip(samples, shapes, strict=True) if shape == shapes[0]]
    if not alike or not all(_in_rows(probe, like=samples[0]) for probe in alike):
        # How large an answer is depends on who else is in the batch, as the length that a decoder stops at does.
        return
    joined: list[Probe] = []
    rows = 0
    for probe in alike:
        if rows >= BATCH_SIZES[-1]:
            break
        joined.append(probe)
        rows += _count(probe)
    start = 0
    for size in BATCH_SIZES:
        if size in taken or (largest is not None and size > largest):
            continue
        chosen = torch.arange(start, start + size) % rows
        start += size
        yield replace(
            samples[0],
            name=f"{size} samples",
            group=SIZES,
            inputs=_joined([probe.inputs for probe in joined], chosen),
            eager=_joined([probe.eager or {} for probe in joined], chosen),
            exact=_joined([probe.exact for probe in joined], chosen),
            perturbed=_joined([probe.perturbed for probe in joined], chosen),
        )


def _joined(parts: Sequence[Inputs], rows: Tensor) -> Inputs:
    return {name: torch.cat([part[name] for part in parts])[rows] for name in parts[0]}


def _count(probe: Probe) -> int:
    return len(next(iter(probe.inputs.values())))


def _in_rows(probe: Probe, like: Probe) -> bool:
    """Whether every tensor has a row a sample, of the same shape as the other probe's."""
    for part, other in ((probe.inputs, like.inputs), (probe.eager or {}, like.eager or {}), (probe.exact, like.exact),
                        (probe.perturbed, like.perturbed)):  # fmt: skip
        if part.keys() != other.keys():
            return False
        for name, tensor in part.items():
            if not tensor.dim() or len(tensor) != _count(probe) or tensor.shape[1:] != other[name].shape[1:]:
                return False
    return True


def _write_validation(
    request: ExportRequest, answers: Answers, dataset: Dataset[Any], raw: Dataset[Any] | None
) -> tuple[Inputs, Reading]:
    """Inputs and targets in the order of `asking_order`, and what the model makes of the first of them, until time is
    up: most of these samples no exporter has seen.

    Returns the inputs of the dataset's first samples, which probes are made from, and what was read.
    """
    parts: dict[str, list[Tensor]] = {}
    first: tuple[Inputs, Tensor] | None = None
    answered: dict[str, Tensor] = {}
    start = asked = 0
    fingerprint = Fingerprint()
    groups = SampleGroups(request.project)

    def see(item: Any) -> None:
        fingerprint.add(item)
        groups.add(item)

    chosen = request.drawn if request.drawn is not None else request.validation_limit
    size = 1 if request.project.coupled else request.batch
    order = partial(asking_order, seed=request.seed)
    limit = math.inf if request.parity_seconds is None else request.parity_seconds
    spent = 0.0
    for inputs, target in served_batches(dataset, raw, size, request.project, chosen, see, order):
        named = name_inputs(answers.model, inputs, answers.project)
        first = (named, target) if first is None else first
        require_alike(first[0], named, (first[1], target), request.dynamic, answers.project)
        for name, tensor in named.items():
            parts.setdefault(f"input.{name}", []).append(tensor)
        parts.setdefault("target", []).append(target)
        begin, start = start, start + len(target)
        if spent >= limit:
            # The rest is for the gates on metrics, which need no answer of the model.
            continue
        # Others on the machine take no samples away.
        began = time.thread_time()
        probe = complete(answers, Probe(name="", group="", inputs=named))
        spent, asked = spent + time.thread_time() - began, start
        # Batch by batch: how long a decoded sequence gets may depend on the batch.
        kinds = {"eager": probe.eager or {}, "float64": probe.exact, "moved": probe.perturbed, "tied": probe.tied}
        for part, tensors in kinds.items():
            for name, tensor in tensors.items():
                answered[validation_key(part, name, begin)] = tensor.contiguous().clone()
    joined = put_together(parts)
    if request.ignored:
        joined[LABELS] = without(joined["target"], request.ignored)
        if f"{SIZE}.target" in joined:
            joined[f"{SIZE}.{LABELS}"] = joined[f"{SIZE}.target"]
    if roundoff := roundoff_of(answers.model):
        joined[ROUNDOFF] = torch.tensor(roundoff, dtype=torch.float64)
    joined[ASKED], joined[SECONDS] = torch.tensor(asked), torch.tensor(spent, dtype=torch.float64)
    rows = torch.tensor(order(start), dtype=torch.int64)
    joined[PLACES] = rows if isinstance(chosen, int) else torch.tensor(list(chosen), dtype=torch.int64)[rows]
    if groups.known:
        joined[GROUP] = torch.tensor(groups.numbers, dtype=torch.int64)[rows]
    save_tensors({**joined, **answered}, Path(request.folder) / VALIDATION)
    first_rows = rows.argsort()[:POOL]
    pool = {name.removeprefix("input."): _rows(joined, name, first_rows) for name in parts if name != "target"}
    return pool, fingerprint.reading()

"""What `export.serving` makes of a model: what is taken, what is refused before training, what it is asked about."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.support.projects import write_project
from torchworker.contract import PLACES, VALIDATION, DynamicDim, ExportRequest, Project, Reference, TensorSpec
from torchworker.custom_loop.preflight import try_parts
from torchworker.exporters.subject import Subject
from torchworker.parity.compare import same_weights
from torchworker.parity.reference import read_golden, write_reference
from torchworker.process.failure import UserError
from torchworker.project import served
from torchworker.project.first_batch import Shipped, try_served
from torchworker.project.served import build_served, raw_dataset, try_serving, weight_names, weights_of
from torchworker.project.signature import require_batches_alike
from torchworker.runtimes.load import Loaded
from torchworker.stages import export
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.kind import Kind, changes_in_kind
from train_and_ship.registry.lineage import config_digest
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.tasks.requests import project_of, user_modules

SAMPLES = 40
PIXELS = torch.randint(0, 256, (SAMPLES, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = (PIXELS[:, 0] > 127).long() + (PIXELS[:, 1] > 200).long()
HERE = __name__


def build_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def build_dataset(split: str) -> TensorDataset:
    return TensorDataset(PIXELS.float() / 255, LABELS)


def build_raw(split: str, keep: int = SAMPLES, shift: int = 0) -> TensorDataset:
    return TensorDataset(PIXELS.roll(shift, 0)[:keep], LABELS.roll(shift, 0)[:keep])


class Served(nn.Module):
    """Raw pixels [batch, 4] uint8 → probabilities [batch, 3] and the two best of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", torch.tensor(255.0))

    def forward(self, pixels: Tensor) -> Any:
        probability = self.model(pixels / self.scale).softmax(1)
        best = probability.topk(2, 1)
        return {"probability": probability, "value": best.values, "place": best.indices}


class Counts(Served):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixels: Tensor) -> Any:
        self.calls += 1
        return super().forward(pixels)


class Remembers(Served):
    seen = 0.0

    def forward(self, pixels: Tensor) -> Any:
        self.seen += 1.0
        return self.model(pixels / self.scale) + self.seen


class MovesBatch(Served):
    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels / self.scale).softmax(1).T


class DropsRows(Served):
    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels / self.scale)[: max(1, len(pixels) - 1)]


class Couples(Served):
    def forward(self, pixels: Tensor) -> Any:
        scores = self.model(pixels / self.scale)
        return scores - scores.mean(0)


class OneMoreInBatches(Served):
    def forward(self, pixels: Tensor) -> Any:
        scores = self.model(pixels / self.scale)
        return (scores, scores * 2) if len(pixels) > 1 else (scores,)


class OneMoreLater(Served):
    calls = 0

    def forward(self, pixels: Tensor) -> Any:
        self.calls += 1
        scores = self.model(pixels / self.scale)
        return (scores, scores * 2) if self.calls > 2 else (scores,)


class OneMoreTable(Served):
    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels / self.scale), self.scale.expand(3) * 2


class PlacesFirst(Served):
    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels / self.scale).topk(2, 1).indices


class ValuesFirst(Served):
    best = 2

    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels / self.scale).softmax(1).topk(self.best, 1).values


class AllValuesFirst(ValuesFirst):
    best = 3


class Untrained(Served):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = nn.Linear(3, 3)


class Yes(Served):
    def forward(self, pixels: Tensor) -> Any:
        return torch.sigmoid(self.model(pixels / self.scale)[:, 0])


class NoAndYes(Served):
    def forward(self, pixels: Tensor) -> Any:
        yes = torch.sigmoid(self.model(pixels / self.scale)[:, 0]) / 4
        return torch.stack([1 - yes, yes], 1)


class Logit(Served):
    def forward(self, pixels: Tensor) -> Any:
        logit = self.model(pixels / self.scale)[:, 0]
        return logit, torch.sigmoid(logit)


def folded(model: nn.Module) -> nn.Module:
    model.get_parameter("0.weight").div_(255)
    return Served(model)


def no_module(model: nn.Module) -> Any:
    return lambda pixels: model(pixels / 255)


def takes_nothing() -> nn.Module:
    raise AssertionError


def project(serving: str | None = "Served", raw: str | None = "build_raw", **more: Any) -> Project:
    args = more.pop("args", {})
    return Project(
        name="plain", folder=str(Path(__file__).parent), loss="cross_entropy",
        metrics=more.pop("metrics", ["accuracy"]),
        model=Reference(target=f"{HERE}:build_model", where="model.factory"),
        data=Reference(target=f"{HERE}:build_dataset", where="data.factory"),
        serving=None if serving is None else Reference(target=f"{HERE}:{serving}", where="export.serving"),
        raw=None if raw is None else Reference(target=f"{HERE}:{raw}", args=args, where="data.raw"), **more,
    )  # fmt: skip


class Words(nn.Module):
    """[batch, length] → [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(words.mean(1, keepdim=True))


class Chances(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return self.model(text).softmax(1)


def sentences(split: str) -> list[tuple[Tensor, int]]:
    """Of four words, then of seven."""
    return [(torch.ones(4 if place < 8 else 7) * place, place % 3) for place in range(16)]


LENGTH = DynamicDim(name="length", min=1, max=9, axes={"text": [1]})


def test_batches_of_a_serving_module_may_differ_in_what_is_declared_by_its_names_and_in_nothing_else() -> None:
    model, dataset = Words().eval(), sentences("validation")
    given = project("Chances", None)
    batches = [(torch.ones(8, length), torch.zeros(8, dtype=torch.long)) for length in (4, 7)]
    # The model itself calls it `words`: its own batches are not what is exported.
    require_batches_alike(model, (batches[0], batches[1]), [LENGTH], given)
    outputs = model(batches[0][0])
    shipped = try_served(model, dataset, outputs, 8, given, ["onnx"], [LENGTH])  # type: ignore[arg-type]
    assert shipped.inputs.shape == (8, 4)
    with pytest.raises(UserError, match=r"validation batches are of different shapes: samples of \[\[4\], \[\]\]"):
        try_served(model, dataset, outputs, 8, given, ["onnx"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="validation batches are of different shapes"):
        require_batches_alike(model, (batches[0], batches[1]), [], given)


def tried(given: Project) -> Shipped:
    model, dataset = build_model(), build_dataset("validation")
    outputs = model.eval()(dataset.tensors[0][:16])
    return try_served(model, dataset, outputs, 16, given, ["onnx"])


# ---- before training


def test_a_model_with_normalisation_softmax_and_top_k_around_it_is_asked_about_raw_inputs() -> None:
    shipped = tried(project())
    assert torch.equal(shipped.inputs, PIXELS[:16]) and torch.equal(shipped.target, LABELS[:16])
    assert not shipped.model.training and not shipped.model.get_submodule("model.1").training
    assert shipped.independence.startswith("Answers do not depend on the other samples of a batch: asked of 4 samples")
    assert (shipped.project.model.where, shipped.project.data.where) == ("export.serving", "data.raw")


def test_without_raw_samples_it_gets_what_the_model_gets_collated_as_the_job_says() -> None:
    collate = Reference(target=f"{HERE}:twice", where="data.collate")
    assert torch.equal(tried(project(raw=None, collate=collate)).inputs, (PIXELS.float() / 255)[:16] * 2)
    # What the job's function makes of items is made of what data.factory gives.
    assert torch.equal(tried(project(collate=collate)).inputs, PIXELS[:16])


def twice(items: list[Any]) -> Any:
    return torch.stack([inputs for inputs, _ in items]) * 2, torch.stack([target for _, target in items])


def test_trying_it_leaves_the_model_and_the_random_numbers_of_training_alone() -> None:
    model = build_model().train()
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    made = try_serving(model, project())
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        made.get_parameter("model.0.weight").zero_()
    assert torch.equal(model.get_parameter("0.weight"), before["0.weight"])


class Locked(nn.Linear):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_built_again_as_the_export_does() -> None:
    model = Locked()
    locked = replace(project(), model=Reference(target=f"{HERE}:Locked", where="model.factory"))
    made = try_serving(model, locked)
    assert made.get_submodule("model") is not model
    assert torch.equal(made.get_parameter("model.weight"), model.weight)


def test_two_columns_of_a_model_with_one_logit_may_fall_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.LABELS", (LABELS > 0).long())
    dataset = build_dataset("validation")
    try_served(build_model().eval(), dataset, torch.full([16], -3.0), 16, project("NoAndYes"), ["onnx"])


@pytest.mark.parametrize(
    ("serving", "said"),
    [
        ("Counts", "export.serving: forward changes the buffer 'calls' in eval mode: test_served.py"),
        ("Remembers", "export.serving: output 'output' of forward differs between two calls on the same inputs"),
        (
            "MovesBatch",
            r"export.serving: output 'output' of forward is float32 \[3, 16\] for a batch of 16; expected the",
        ),
        ("DropsRows", r"export.serving: output 'output' of forward is float32 \[15, 3\] for a batch of 16"),
        ("Couples", "export.serving: the answer to a sample depends on the other samples of its batch"),
        (
            "OneMoreInBatches",
            r"export.serving: forward returns 2 tensors \(output_0, output_1\) for a batch of 16 and 1 tensor "
            r"\(output_0\) for one sample; exported formats return the same tensors whatever they are asked",
        ),
        (
            "OneMoreLater",
            r"export.serving: forward returns 1 tensor \(output_0\), and 2 tensors \(output_0, output_1\) when",
        ),
        ("OneMoreTable", r"export.serving: output 'output_1' of forward is float32 \[3\] for a batch of 16"),
        ("PlacesFirst", r"accuracy takes the largest of several columns .* is int64 \[16, 2\], where the model gives"),
        (
            "ValuesFirst",
            r"accuracy takes the largest .* is float32 \[16, 2\], .* gives float32 \[16, 3\]; return a score",
        ),
        ("AllValuesFirst", r"accuracy takes the largest .* is float32 \[16, 3\], in falling order where the model"),
        ("Untrained", f"export.serving: {HERE}:Untrained makes another module each time .*: head.weight differs"),
        ("folded", f"export.serving: {HERE}:folded changes 0.weight of the model that it is given; what ships has the"),
        ("no_module", f"export.serving: {HERE}:no_module must return a torch.nn.Module, got function"),
        (
            "takes_nothing",
            f"export.serving: {HERE}:takes_nothing failed: TypeError: takes_nothing.. takes 0 positional",
        ),
        ("absent", f"export.serving: {HERE}:absent: module '{HERE}' .* has no 'absent'"),
    ],
)
def test_what_cannot_be_served_is_refused_before_training(serving: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tried(project(serving))


def test_a_probability_is_not_taken_for_a_logit_of_which_every_answer_would_be_yes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{HERE}.LABELS", (LABELS > 0).float())
    model, dataset = build_model().eval(), build_dataset("validation")
    own = model(dataset.tensors[0][:16])[:, 0]
    with pytest.raises(UserError, match=r"accuracy takes one column for a logit, .* \[16\] from 0\.\d+ to 0\.\d+"):
        try_served(model, dataset, own, 16, project("Yes"), ["onnx"])
    # Also where the untrained model's logits all lie between 0 and 1.
    model[3].weight.data.mul_(0.01)  # type: ignore[union-attr, operator]
    model[3].bias.data.fill_(0.5)  # type: ignore[union-attr, operator]
    own = model(dataset.tensors[0][:16])[:, 0]
    assert float(own.detach().min()) > 0 and float(own.detach().max()) < 1
    try_served(model, dataset, own, 16, project("Logit"), ["onnx"])
    # Nobody asks for accuracy.
    try_served(model, dataset, own, 16, project("Yes", metrics=["mean_absolute_error"]), ["onnx"])


# ---- raw samples


def test_raw_samples_are_those_of_the_factory_in_number_and_order() -> None:
    with pytest.raises(UserError, match=r"data\.raw: .*:build_raw\(split='validation'\) has 39 samples and .* 40"):
        tried(project(args={"keep": 39}))
    first = next(place for place in range(SAMPLES) if LABELS[place] != LABELS[place - 1])
    said = rf"data\.raw: .* gives target {LABELS[first - 1]} for sample {first}, where .*_dataset has {LABELS[first]}"
    with pytest.raises(UserError, match=said):
        tried(project(args={"shift": 1}))


def test_a_stream_of_raw_samples_that_ends_early_is_refused() -> None:
    given, short = project(), Stream(SAMPLES - 3)
    with pytest.raises(UserError, match=r"gives 37 samples where .* has 40; expected the same samples"):
        list(served.served_batches(Stream(SAMPLES), short, 16, given))
    with pytest.raises(UserError, match=r"gives 37 samples where .* has 32; expected"):
        list(served.served_batches(Stream(SAMPLES - 8), short, 16, given))


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Any:
        return iter([(PIXELS[place], LABELS[place]) for place in range(self._count)])


def test_a_raw_target_on_a_scale_may_be_in_units_of_its_own() -> None:
    normal, euros = TensorDataset(PIXELS.float(), LABELS / 3), TensorDataset(PIXELS, LABELS * 100.0)
    (batch,) = served.served_batches(normal, euros, SAMPLES, project())
    assert torch.equal(batch[1], LABELS * 100.0)


def test_golden_inputs_and_gates_are_raw_and_the_fingerprint_is_of_what_was_inspected(tmp_path: Path) -> None:
    given, dataset = project(), build_dataset("validation")
    exported = build_served(build_model().eval(), given)
    request = ExportRequest(
        project=given, folder=str(tmp_path), weights="", formats=[], batch=4, seed=0, validation_limit=100,
        drawn=[1, 5, 7, 30],
    )  # fmt: skip
    raw = raw_dataset(dataset, "validation", given)
    torch.set_num_threads(1)
    with torch.no_grad():
        _, read = write_reference(request, exported, {"pixels": PIXELS[:4]}, dataset, "", raw)
    assert [probe.inputs["pixels"].dtype for probe in read_golden(tmp_path, None)] == [torch.uint8] * 3
    kept = load_file(tmp_path / VALIDATION)
    places = kept[PLACES]
    assert sorted(places.tolist()) == [1, 5, 7, 30]
    assert torch.equal(kept["input.pixels"], PIXELS[places]) and torch.equal(kept["target"], LABELS[places])
    plain = ExportRequest(
        project=project(None, None), folder=str(tmp_path), weights="", formats=[], batch=4, seed=0,
        validation_limit=100, drawn=[1, 5, 7, 30],
    )  # fmt: skip
    with torch.no_grad():
        _, own = write_reference(plain, build_model().eval(), {"input": PIXELS[:4] / 255}, dataset)
    assert read == own and read.samples == 4


# ---- weights


def test_weights_are_held_against_the_trained_ones_by_what_they_are_called_there(tmp_path: Path) -> None:
    model = build_model().eval()
    known = weights_of(model)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    exported = build_served(model, project())
    names = weight_names(exported, known)
    assert names == {f"model.{name}": name for name in model.state_dict()}

    def verdict(state: dict[str, Tensor], names: dict[str, str] | None) -> Any:
        return same_weights("pt2", Loaded(list, lambda _: iter(state.items())), tmp_path / "weights.safetensors", names)

    (passed,) = verdict(exported.state_dict(), names)
    assert passed.passed and passed.note == "9 of 9 tensors held bit for bit"
    other = {name: tensor.clone() for name, tensor in exported.state_dict().items()}
    other["model.3.weight"][0, 0] += 1e-7
    (failed,) = verdict(other, names)
    assert not failed.passed and failed.note == "other values than were trained: model.3.weight"
    # Of copies nothing is known: what has the name of a trained tensor may be made of it.
    assert verdict(exported.state_dict(), {}) == verdict(exported.state_dict(), None) == []


# ---- in the job, in the gates and beside what is live


EXPORT = {"serving": "around:serve"}
DATA = {"factory": "plain:build_dataset", "raw": {"factory": "raw:build_raw", "args": {"keep": 9}}}


def job_of(folder: Path, **more: Any) -> Job:
    return load_job(write_project(folder, **more))[0]


def test_the_job_names_both_for_the_workers_and_the_clean_room_imports_neither(tmp_path: Path) -> None:
    job = job_of(tmp_path, export=EXPORT, data=DATA)
    given = project_of(job, tmp_path)
    assert given.serving == Reference(target="around:serve", where="export.serving")
    assert given.raw == Reference(target="raw:build_raw", args={"keep": 9}, where="data.raw.factory")
    for name in ("around", "raw"):
        (tmp_path / f"{name}.py").touch()
    assert user_modules(job, tmp_path) == ["around", "plain", "raw"]


def test_raw_inputs_without_a_module_that_takes_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"expected export\.serving with data\.raw, the module that takes raw inputs"):
        job_of(tmp_path, data=DATA)
    raw = {"factory": "plain:build_raw", "args": {"split": "train"}}
    with pytest.raises(JobError, match=r"data\.raw\.args without split, which is given"):
        job_of(tmp_path, export=EXPORT, data={**DATA, "raw": raw})


def test_another_serving_module_makes_another_release_of_the_same_training(
    tmp_path: Path,
) -> None:
    plain, other = job_of(tmp_path), job_of(tmp_path, export=EXPORT, data=DATA)
    assert plain.training_digest() == other.training_digest()
    assert config_digest(plain) != config_digest(other)
    recorded = plain.model_dump(mode="json")
    assert "serving" not in recorded["export"] and "raw" not in recorded["data"]


def test_another_serving_module_and_one_tensor_more_are_of_another_kind_than_what_is_live(tmp_path: Path) -> None:
    def kind(outputs: list[str], **export: Any) -> Kind:
        specs = [TensorSpec(name=name, dtype="float32", shape=["batch", 3]) for name in outputs]
        signature = {"outputs": [vars(spec) for spec in specs]}
        manifest = Manifest(model="m", release="r", files={}, formats={}, signature=signature, metrics={})
        recorded = job_of(tmp_path, export=export).model_dump(mode="json")
        return Kind.of(manifest, lambda name: recorded if name == "job.json" else {})

    def said(live: Kind, candidate: Kind) -> list[str]:
        return [f"{change.kind}: {change}" for change in changes_in_kind(live, candidate)]

    plain, softmax = kind(["output"]), kind(["output"], **EXPORT)
    assert said(plain, softmax) == ["model: export.serving: none → around:serve"]
    assert said(softmax, plain) == ["model: export.serving: around:serve → none"]
    assert said(softmax, kind(["output", "place"], **EXPORT)) == ["signature: output place: none → float32 [batch, 3]"]


def test_int8_ranges_are_taken_from_raw_training_samples() -> None:
    request = ExportRequest(
        project=project(), folder="", weights="", formats=[], batch=4, seed=0, validation_limit=1, calibration_samples=6
    )
    exported = build_served(build_model().eval(), project())
    subject = Subject(model=exported, inputs={"pixels": PIXELS[:4]}, outputs=[], dims=[], project=request.project)
    first, second = export._calibration(request, subject)
    assert [first["pixels"].dtype, len(first["pixels"]), len(second["pixels"])] == [torch.uint8, 4, 2]


def test_a_loop_of_ones_own_is_asked_the_same_of_what_it_will_serve() -> None:
    facts = try_parts(project(), formats=["onnx"])
    assert [(spec.name, spec.dtype) for spec in facts.inputs] == [("pixels", "uint8")]
    assert [spec.name for spec in facts.outputs] == ["probability", "value", "place"]
    assert facts.parameters == sum(item.numel() for item in build_model().parameters())
    with pytest.raises(UserError, match=r"export\.serving: forward changes the buffer 'calls'"):
        try_parts(project("Counts"), formats=["onnx"])

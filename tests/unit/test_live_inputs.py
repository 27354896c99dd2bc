"""What the live release is asked about where data.factory fits its preprocessing anew: inputs from its own files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.support.projects import write_project
from torchworker.contract import (
    LIVE_VALIDATION,
    PLACES,
    VALIDATION,
    ExportRequest,
    LiveInputsRequest,
    LiveInputsResult,
    Project,
    Reference,
    RehearsedRelease,
    RehearseRequest,
    TensorSpec,
)
from torchworker.parity.reference import put_together, validation_batches, write_reference
from torchworker.process.failure import UserError
from torchworker.project import served
from torchworker.stages import rehearse
from torchworker.stages.live_inputs import live_inputs
from train_and_ship.infra.errors import JobError, WorkerError
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.lineage import config_digest
from train_and_ship.tasks import live_inputs as asked
from train_and_ship.tasks.requests import project_of, user_modules
from train_and_ship.tasks.worker import Limits

HERE = __name__
COLOURS = ["red", "blue", "green", "blue", "red", "green"]
"""Of the samples; red was called crimson when the live release was made."""
LABELS = torch.tensor([1, 0, 0, 0, 1, 0])
MINE, LIVE = ["blue", "green", "red"], ["blue", "crimson", "green", "red"]


def encoded(known: Sequence[str]) -> Tensor:
    """[samples, categories] float32, a column for each known one."""
    return torch.tensor([[float(colour == one) for one in known] for colour in COLOURS])


def build_dataset(split: str) -> TensorDataset:
    return TensorDataset(encoded(MINE), LABELS)


def for_live(split: str, files: Path, labels: Tensor = LABELS) -> TensorDataset:
    assert split == "validation"
    return TensorDataset(encoded(json.loads((files / "colours.json").read_text())), labels)


def other_samples(split: str, files: Path) -> TensorDataset:
    return for_live(split, files, LABELS.roll(1))


def by_name(split: str, files: Path) -> list[Any]:
    return [({"shape": row}, label) for row, label in zip(encoded(LIVE), LABELS, strict=True)]


def twice(split: str, files: Path) -> list[Any]:
    return [((row, row), label) for row, label in zip(encoded(MINE), LABELS, strict=True)]


def upside_down(split: str, files: Path) -> TensorDataset:
    return TensorDataset(encoded(json.loads((files / "colours.json").read_text())).flip(1), LABELS)


def project(name: str | None = "for_live") -> Project:
    return Project(
        name="plain", folder=str(Path(__file__).parent), loss="cross_entropy", metrics=["accuracy"],
        model=Reference(target=f"{HERE}:nothing", where="model.factory"),
        data=Reference(target=f"{HERE}:build_dataset", where="data.factory"),
        for_live=None if name is None else Reference(target=f"{HERE}:{name}", where="data.for_live"),
    )  # fmt: skip


def request(tmp_path: Path, name: str = "for_live", known: Sequence[str] = LIVE) -> LiveInputsRequest:
    """The candidate's samples are the fifth, second and third, as they were drawn."""
    places, (files, own, out) = torch.tensor([4, 1, 2]), (tmp_path / name for name in ("files", "own", "out"))
    for folder, fitted in ((files, known), (own, MINE), (out, [])):
        folder.mkdir(exist_ok=True)
        (folder / "colours.json").write_text(json.dumps(fitted))
    group = torch.tensor([0, 0, 1])
    kept = {"input.colour": encoded(MINE)[places], "target": LABELS[places], PLACES: places, "group": group}
    save_file(kept, tmp_path / VALIDATION)
    return LiveInputsRequest(
        project=project(name), folder=str(out), validation=str(tmp_path / VALIDATION), files=str(files),
        own_files=str(own), batch=2, own_inputs=[TensorSpec(name="colour", dtype="float32", shape=["batch", 3])],
        inputs=[TensorSpec(name="colour", dtype="float32", shape=["batch", len(known)])],
    )  # fmt: skip


def test_the_same_samples_are_prepared_by_the_files_of_the_live_release(tmp_path: Path) -> None:
    result = live_inputs(request(tmp_path))
    assert (result.samples, result.changed) == (3, 3)
    made = load_file(tmp_path / "out" / LIVE_VALIDATION)
    assert torch.equal(made["input.colour"], encoded(LIVE)[[4, 1, 2]])
    assert torch.equal(made["target"], LABELS[[4, 1, 2]]) and made["group"].tolist() == [0, 0, 1]


def test_samples_that_its_files_prepare_otherwise_are_counted(tmp_path: Path) -> None:
    # Two columns have changed places: blue, the second sample, is in neither of them.
    assert live_inputs(request(tmp_path, known=["blue", "red", "green"])).changed == 2
    assert live_inputs(request(tmp_path, known=MINE)).changed == 0


def padded(split: str, files: Path) -> list[Any]:
    """Each colour as often as its place says: a batch is as long as its longest."""
    rows = encoded(json.loads((files / "colours.json").read_text()))
    return [
        (row.argmax().repeat(place + 1), label) for place, (row, label) in enumerate(zip(rows, LABELS, strict=True))
    ]


def longest(items: list[Any]) -> tuple[Tensor, Tensor]:
    return nn.utils.rnn.pad_sequence([row for row, _ in items], batch_first=True), torch.stack([it for _, it in items])


def test_batches_that_are_padded_to_their_own_length_are_prepared_so_again(tmp_path: Path) -> None:
    asks = request(tmp_path, "padded", MINE)
    collate = Reference(target=f"{HERE}:longest", where="data.collate")
    specs = [TensorSpec(name="colour", dtype="int64", shape=["batch", "length"])]
    asks = replace(asks, project=replace(asks.project, collate=collate), own_inputs=specs, inputs=specs)
    own = padded("validation", tmp_path / "own")
    batches = [longest([own[place] for place in places]) for places in ([1, 2], [4])]
    kept = put_together({"input.colour": [item[0] for item in batches], "target": [item[1] for item in batches]})
    save_file({**kept, PLACES: torch.tensor([1, 2, 4])}, tmp_path / VALIDATION)
    assert live_inputs(asks).changed == 0
    made = load_file(tmp_path / "out" / LIVE_VALIDATION)
    lengths = [list(probe.inputs["colour"].shape) for probe, _ in validation_batches(made, specs, 8)]
    assert lengths == [[2, 3], [1, 5]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other_samples", "gives other samples than data.factory: expected the same targets in the same order, int64"),
        ("by_name", "gives inputs shape; expected those of the release, colour"),
        ("twice", "gives inputs 2 of them; expected those of the release, colour"),
        (
            "upside_down",
            "prepares 2 of 3 samples otherwise than data.factory when it is given the candidate's own",
        ),
        ("absent", "has no 'absent'"),
    ],
)
def test_what_gives_other_samples_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"data\.for_live: .*{said}"):
        live_inputs(request(tmp_path, name))


def test_what_cannot_be_called_with_files_is_refused_before_training() -> None:
    served.require_for_live(project())
    served.require_for_live(project(None))
    said = r"data\.for_live: .*:build_dataset is called as build_dataset\(split=…, files=…\): got an unexpected keyword"
    with pytest.raises(UserError, match=said):
        served.require_for_live(project("build_dataset"))


def test_a_file_that_the_live_release_does_not_have_is_the_functions_error(tmp_path: Path) -> None:
    asks = request(tmp_path)
    (tmp_path / "files" / "colours.json").unlink()
    with pytest.raises(UserError, match=r"data\.for_live: .*for_live\(.*failed: FileNotFoundError"):
        live_inputs(asks)


def test_the_places_of_drawn_samples_are_kept_for_it(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    asks = ExportRequest(
        project=project(), folder=str(tmp_path), weights="", formats=[], batch=2, seed=0, validation_limit=4
    )
    for drawn, places in (([1, 2, 4], [4, 1, 2]), (None, [0, 1, 3, 2])):
        with torch.no_grad():
            model, named = nn.Linear(3, 2).eval(), {"input": encoded(MINE)[:2]}
            write_reference(replace(asks, drawn=drawn), model, named, build_dataset("validation"))
        assert load_file(tmp_path / VALIDATION)[PLACES].tolist() == places


class Scores(nn.Module):
    """Red is 1, by the column that it is in."""

    def __init__(self, known: Sequence[str]) -> None:
        super().__init__()
        self.register_buffer("red", torch.tensor([10.0 * (colour == "red") for colour in known]))

    def forward(self, colour: Tensor) -> Tensor:
        return colour @ self.red - 5.0


def test_a_live_model_scores_by_its_own_files_what_it_scored_before_a_category_was_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ["crimson", "red", "blue"]
    live_inputs(request(tmp_path, known=known))
    model = Scores(known)
    monkeypatch.setattr(rehearse, "load_artifact", lambda kind, path, threads: lambda inputs: [model(inputs["colour"])])
    live = RehearsedRelease(
        folder=str(tmp_path), formats={"onnx": "model.onnx"}, files={},
        inputs=[TensorSpec(name="colour", dtype="float32", shape=["batch", 3])],
        outputs=[TensorSpec(name="output", dtype="float32", shape=["batch"])],
    )  # fmt: skip
    asks = RehearseRequest(
        candidate=live, live=live, validation=str(tmp_path / VALIDATION), moved=None, metrics=["accuracy"],
        forbidden_modules=[], forbidden_folder="", threads=1,
    )  # fmt: skip

    def accuracy(asks: RehearseRequest) -> float:
        scores: Any = {}
        assert rehearse._score_live(asks, load_file(tmp_path / VALIDATION), 2, 0, scores, {}) == ""
        (values, count) = scores["onnx"]["accuracy"].sum(0).tolist()
        return float(values / count)

    assert accuracy(replace(asks, live_validation=str(tmp_path / "out" / LIVE_VALIDATION))) == 1.0
    assert accuracy(asks) == pytest.approx(1 / 3)


# ---- what a run makes of it


def release(folder: Path, **files: str) -> RehearsedRelease:
    named = {f"files/{name}.json": text for name, text in files.items()}
    return RehearsedRelease(
        folder=str(folder), formats={}, inputs=[], outputs=[], files={"model.onnx": folder.name, **named}
    )


def told(
    monkeypatch: pytest.MonkeyPatch,
    given: Project,
    candidate: RehearsedRelease,
    live: RehearsedRelease | None,
    answer: LiveInputsResult | Exception,
) -> asked.LiveInputs:
    async def ask(*_: Any, **__: Any) -> LiveInputsResult:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(asked, "ask_worker", ask)
    server: Any = None
    return asyncio.run(
        asked.live_inputs(
            server, given, candidate, live, Path("/exported"), Path("/work"), Limits(memory=1, seconds=1), 8
        )
    )


def test_files_that_changed_are_told_where_the_job_does_not_say_how_inputs_are_prepared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = release(tmp_path / "a", colours="1", sizes="2", new="3")
    live = release(tmp_path / "b", colours="1", sizes="9")
    never = AssertionError("nobody is asked")
    found = told(monkeypatch, project(None), mine, live, never)
    assert not found.file and not found.problem
    assert found.said.startswith("files/new.json, files/sizes.json changed since it was made: if data.factory prepares")
    assert told(monkeypatch, project(None), live, live, never) == asked.LiveInputs()
    assert told(monkeypatch, project(None), mine, None, never) == asked.LiveInputs()
    raw = replace(project(None), raw=Reference(target="a:b", where="data.raw"))
    assert told(monkeypatch, raw, mine, live, never) == asked.LiveInputs()
    bare = told(monkeypatch, project(), mine, release(tmp_path / "c"), never)
    assert bare == asked.LiveInputs(
        said="it ships no files, so that it was asked about inputs as the candidate takes them"
    )


def test_samples_that_are_prepared_otherwise_are_told_and_a_failure_is_no_failure_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine, live = release(tmp_path / "a", colours="1"), release(tmp_path / "b", colours="2")
    found = told(monkeypatch, project(), mine, live, LiveInputsResult(samples=1200, changed=1030))
    assert found == asked.LiveInputs(
        file=f"/work/{LIVE_VALIDATION}",
        said="its own files prepare 1,030 of 1,200 samples otherwise; it was asked about these",
    )
    failed = told(monkeypatch, project(), mine, live, JobError("data.for_live: plain:f failed\nmore"))
    assert failed.problem == "its inputs cannot be prepared with its own files: data.for_live: plain:f failed"
    with pytest.raises(WorkerError):
        told(monkeypatch, project(), mine, live, WorkerError("out of memory"))


# ---- in the job


DATA = {"factory": "plain:build_dataset", "for_live": "again:prepare"}
EXPORT = {"extras": "plain:write"}


def job_of(folder: Path, **more: Any) -> Job:
    return load_job(write_project(folder, **more))[0]


def test_the_job_names_it_for_the_workers_and_no_training_depends_on_it(tmp_path: Path) -> None:
    job, plain = job_of(tmp_path, data=DATA, export=EXPORT), job_of(tmp_path, export=EXPORT)
    assert project_of(job, tmp_path).for_live == Reference(target="again:prepare", where="data.for_live")
    (tmp_path / "again.py").touch()
    assert user_modules(job, tmp_path) == ["again", "plain"]
    assert (job.training_digest(), config_digest(job)) == (plain.training_digest(), config_digest(plain))
    assert "for_live" not in plain.model_dump(mode="json")["data"]


@pytest.mark.parametrize(
    ("data", "export", "said"),
    [
        ({}, {}, "expected export.files or export.extras with data.for_live, which is given the files of a release"),
        ({"raw": "plain:r"}, {**EXPORT, "serving": "plain:s"}, "expected data.raw or data.for_live: raw inputs are"),
        (
            {"for_live": {"factory": "again:prepare", "args": {"files": "a"}}},
            EXPORT,
            "expected data.for_live.args without files, which is given",
        ),
        (
            {"for_live": {"factory": "again:prepare", "args": {"split": "a"}}},
            EXPORT,
            "expected data.for_live.args without split, which is given",
        ),
    ],
)
def test_what_cannot_be_given_to_it_is_refused(tmp_path: Path, data: Any, export: Any, said: str) -> None:
    with pytest.raises(JobError) as caught:
        job_of(tmp_path, data={**DATA, **data}, export=export)
    assert said in str(caught.value)

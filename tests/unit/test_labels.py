"""What the columns of a model's first output are called: in the job, in the data, in the release and in its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from shipreader import records
from shipreader.inference_limits import Limits
from shipreader.inference_model import Model, ModelDocument
from shipreader.inference_served import Served
from shipreader.inference_tensors import Signature, answer, parse
from tests.support.onnx_releases import KINDS, SIGNATURE, kinds_release
from tests.support.projects import write_project
from torchworker.contract import Project, Reference, TensorSpec, label_counts
from torchworker.process.failure import UserError
from torchworker.project.first_batch import try_batch
from torchworker.project.labels import other_order, require_labels
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.diff import ReleaseRecord, _signature
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.kind import Kind, changes_in_kind
from train_and_ship.registry.release.labels import labels_of
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.tasks.requests import project_of

NOTHING = Reference(target="a:b", where="model.factory")
SCORES = TensorSpec(name="scores", dtype="float32", shape=["batch", 3])


def project(*labels: str) -> Project:
    return Project(name="plain", folder="", model=NOTHING, data=NOTHING, loss="mse_loss", metrics=[], labels=labels)


# ---- in the job


def test_labels_of_a_job_reach_the_workers(tmp_path: Path) -> None:
    job, folder = load_job(write_project(tmp_path, export={"labels": ["cat", "dog", "löwe"]}))
    assert project_of(job, folder).labels == ("cat", "dog", "löwe")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat", "dog", "cat"], "expected each text once, and number 2 is 'cat' again"),
        (["cat", 3], "expected texts, and number 1 is 3, which YAML reads as text in quotes only"),
        (["yes", True], "expected texts, and number 1 is True, which YAML reads as text in quotes only"),
        (["cat", ["dog"]], "expected texts, and number 1 is ['dog']"),
        (["", "dog"], "expected printable texts of 1 to 512 bytes in UTF-8, and number 0 is ''"),
        (["cat", "d\nog"], r"and number 1 is 'd\nog'"),
        (["ö" * 257], "of 1 to 512 bytes in UTF-8, and number 0 is"),
        ([f"{number:0500}" for number in range(2100)], "at most 1,048,576 bytes for all of them, and they have 1,058,"),
        (["x" * 513], "of 1 to 512 bytes in UTF-8, and number 0 is"),
        ([], "expected a list of texts, one at least"),
        ("cat", "expected a list of texts, one at least"),
        ({"cat": 0}, "expected a list of texts, one at least"),
    ],
)
def test_what_cannot_be_labels_is_refused_with_its_line(tmp_path: Path, labels: Any, said: str) -> None:
    with pytest.raises(JobError, match=r"job\.yaml:\d+: export\.labels: expected ") as caught:
        load_job(write_project(tmp_path, export={"labels": labels}))
    assert said in str(caught.value)


# ---- beside the model


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        (["batch", 10], [10]),
        ([1, 10], [10]),
        # One number that tells yes from no.
        (["batch"], [1, 2]),
        (["batch", 1], [1, 2]),
        # Maps have their classes second, tags of words last.
        (["batch", 21, 64, 64], [21, 64]),
        (["batch", "length", 5], [5]),
        (["batch", 5, "length"], [5]),
        (["batch", "length"], []),
    ],
)
def test_there_are_as_many_labels_as_columns(shape: list[int | str], counts: list[int]) -> None:
    # A reader and a worker each have their own: neither is installed beside the other.
    assert label_counts(shape) == records.label_counts(shape) == counts


def test_labels_of_a_wrong_count_are_refused_before_training() -> None:
    batch = torch.randn(4, 2), torch.zeros(4, 3)
    model = nn.Linear(2, 3).eval()
    with pytest.raises(UserError) as caught:
        try_batch(model, None, batch, project("cat", "dog"), ["onnx"])
    assert str(caught.value) == (
        "export.labels: expected 3 texts, one for each column of output 'output' of forward, [batch, 3], got 2 "
        "(cat, dog)"
    )
    try_batch(model, None, batch, project("cat", "dog", "bird"), ["onnx"])
    # Samples of training are not exported, and a batch of another size has nothing to say.
    try_batch(model, None, batch, project("cat", "dog"), None)


def test_labels_of_columns_whose_number_changes_are_refused() -> None:
    with pytest.raises(UserError, match=r"fixed number of columns, got output 'y' of forward, \[batch, length\]"):
        require_labels(project("a", "b"), "y", ["batch", "length"])
    with pytest.raises(UserError, match=r"got 7 \(0, 1, 2, 3, 4, …\)"):
        require_labels(project(*map(str, range(7))), "y", ["batch", 3])
    require_labels(project(), "y", ["batch", "length"])


# ---- in the release


def test_what_the_job_says_goes_before_what_the_data_says() -> None:
    assert labels_of(("a", "b", "c"), ["x", "y", "z"], SCORES, "plain:data") == (["a", "b", "c"], "")
    assert labels_of((), ["x", "y", "z"], SCORES, "plain:data") == (["x", "y", "z"], "")
    assert labels_of((), [], SCORES, "plain:data") == ([], "")
    # Names of its own are its own; the same in another order is a mistake, or a model that knows why.
    labels, why = labels_of(("x", "z", "y"), ["x", "y", "z"], SCORES, "plain:data")
    assert labels == ["x", "z", "y"] and "column 1 is labelled 'z', and label 1 of the data is 'y'" in why
    assert labels_of(("x", "y", "z"), ["x", "y", "z"], SCORES, "plain:data") == (["x", "y", "z"], "")


def test_a_check_tells_of_labels_that_are_the_classes_of_the_data_in_another_order() -> None:
    pictures = TensorDataset(torch.zeros(4))
    pictures.classes = ["cat", "dog", "bird"]  # type: ignore[attr-defined]
    (said,) = other_order(project("bird", "cat", "dog"), Subset(pictures, [0]))
    assert "column 0 is labelled 'bird', and label 0 of the data is 'cat'" in said
    for labels in (("cat", "dog", "bird"), ("Katze", "Hund", "Vogel"), ()):
        assert other_order(project(*labels), pictures) == []


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["x", "y"], "the release has no labels: plain:data has `classes`, and there are 2 for 3 columns of scores"),
        (["x", "x", "y"], "labels are each text once, and number 1 is 'x' again; name them in export.labels"),
        (["x", "", "y"], "labels are printable texts of 1 to 512 bytes in UTF-8, and number 1 is ''"),
    ],
)
def test_classes_of_the_data_that_do_not_fit_are_no_labels_and_that_is_said(classes: list[str], said: str) -> None:
    labels, why = labels_of((), classes, SCORES, "plain:data")
    assert labels == [] and said in why


def kind(*labels: str, classes: tuple[str, ...] = ()) -> Kind:
    outputs = [{"name": "scores", "dtype": "float32", "shape": ["batch", 3]}]
    return Kind(signature={"outputs": outputs, **({"labels": list(labels)} if labels else {})}, classes=classes)


def test_labels_that_changed_or_changed_places_are_of_another_kind() -> None:
    def said(live: Kind, candidate: Kind) -> list[str]:
        return [f"{change.kind}: {change}" for change in changes_in_kind(live, candidate)]

    live = kind("bird", "cat", "dog")
    assert said(live, kind("bird", "cat", "dog")) == []
    assert said(live, kind("bird", "dog", "cat")) == ["labels: class 1: cat of 3 → dog of 3"]
    assert said(live, kind("bird", "cat", "wolf")) == ["labels: class 2: dog of 3 → wolf of 3"]
    # A release of before has them from its data alone.
    assert said(kind(classes=("bird", "dog", "cat")), live) == ["labels: class 1: dog of 3 → cat of 3"]
    assert said(live, kind()) == ["labels: labels: bird, cat, dog → none"]
    assert said(kind(), live) == []
    # Labels that stay where the classes of the data changed places are wrong.
    turned = said(kind("a", "b", "c", classes=("x", "y", "z")), kind("a", "b", "c", classes=("z", "y", "x")))
    assert turned == ["labels: class 0 of the data: x of 3 → z of 3"]
    # One change is told once, and classes that one side does not have are no change.
    names = ("bird", "cat", "dog")
    assert said(kind(*names, classes=names), kind(*names[::-1], classes=names[::-1])) == [
        "labels: class 0: bird of 3 → dog of 3"
    ]
    assert said(kind(*names, classes=names), kind(*names)) == said(kind(*names), kind(*names, classes=names)) == []


def test_labels_that_nobody_shows_any_more_are_missed_whatever_the_data_has() -> None:
    def said(live: Kind, candidate: Kind) -> list[str]:
        return [f"{change.kind}: {change}" for change in changes_in_kind(live, candidate)]

    names = ("bird", "cat", "dog")
    gone = "labels: labels: bird, cat, dog → none"
    assert said(kind(*names), kind(classes=names)) == [gone]
    assert said(kind(*names, classes=names), kind(classes=names)) == [gone]
    # Classes are compared apart.
    assert said(kind(*names, classes=names), kind(classes=("bird", "dog", "cat"))) == [
        gone,
        "labels: class 1: cat of 3 → dog of 3",
    ]


def test_the_difference_of_two_releases_shows_them() -> None:
    signature = {**SIGNATURE, "labels": ["cat", "dog", "bird", "fish"]}
    manifest = Manifest(model="m", release="r", files={}, formats={}, signature=signature, metrics={})
    assert _signature(ReleaseRecord(manifest=manifest, files={}))["labels"] == "cat, dog, bird, fish"


# ---- in answers

LABELLED = {**KINDS, "labels": ["no", "yes"]}
ITEMS = [
    {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]},
    {"name": "half", "datatype": "FP16", "shape": [1, 2], "data": [1, 2]},
    {"name": "id", "datatype": "INT64", "shape": [1], "data": [9]},
    {"name": "flag", "datatype": "BOOL", "shape": [1], "data": [True]},
]
NUMBERS = [np.zeros(1, np.float32), np.zeros((1, 1), np.int64)]


def answered(signature: dict[str, Any], parameters: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = [{"name": name, "parameters": parameters} for name in ("log", "row")]
    body = json.dumps({"inputs": ITEMS, "outputs": wanted}).encode()
    text, length = answer(parse(body, None, Signature.of(signature)), NUMBERS, "digits", "1")
    found: list[dict[str, Any]] = json.loads(text[:length])["outputs"]
    return found


def test_an_answer_has_the_labels_of_its_first_output_for_whoever_asks() -> None:
    first, second = answered(LABELLED, {"labels": True})
    # A parameter of the protocol is a text.
    assert first["parameters"] == {"labels": '["no", "yes"]'} and "parameters" not in second
    assert "parameters" not in answered(LABELLED, {})[0] and "parameters" not in answered(KINDS, {"labels": True})[0]
    both = answered(LABELLED, {"labels": True, "binary_data": True})[0]["parameters"]
    assert both == {"labels": '["no", "yes"]', "binary_data_size": 4}


def test_the_metadata_of_a_model_has_them(tmp_path: Path) -> None:
    kinds_release(tmp_path / "release")
    served = Served("digits", Limits())
    path = str(tmp_path / "release" / "model.onnx")
    for signature, said in ((LABELLED, {"labels": '["no", "yes"]'}), (KINDS, None)):
        model = Model(ModelDocument("digits", 7, path, signature, 8), spin=False)
        outputs = served.metadata(model)["outputs"]
        assert outputs[0].get("parameters") == said and "parameters" not in outputs[1]

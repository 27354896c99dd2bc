"""What makes a candidate another kind of thing than what is live, by what releases record."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import onnx_ir as ir
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from tests.support.projects import write_project
from torchworker.contract import Interval, RehearseResult
from torchworker.project.labels import class_names
from torchworker.project.metrics import constant_score
from train_and_ship.infra.errors import GateError, JobError, RequestError
from train_and_ship.infra.provenance import project_place
from train_and_ship.registry.bucket.releases import Published
from train_and_ship.registry.channels import moves
from train_and_ship.registry.gates import live_score
from train_and_ship.registry.job.job import Allowed
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.kind import (
    KINDS,
    Kind,
    KindChange,
    changes_in_kind,
    in_words,
    kinds_in,
    not_allowed,
    refusal,
    require_kinds,
)
from train_and_ship.registry.lineage import Inputs
from train_and_ship.registry.release.manifest import DATA, JOB, LINEAGE, VERDICTS, Manifest
from train_and_ship.registry.release.onnx_header import onnx_versions
from train_and_ship.ship.named import named_kinds
from train_and_ship.tasks.promote import _require_same_kind
from train_and_ship.tasks.results import Answer, Rehearsed

BATCH = {"name": "batch", "min": 1, "max": None}
LENGTH = {"name": "length", "min": 1, "max": 512}


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


INPUTS = [tensor("x", "batch", 8)]
OUTPUTS = [tensor("logits", "batch", 3)]


def signed(inputs: list[Any] = INPUTS, outputs: list[Any] = OUTPUTS, *dims: Mapping[str, Any]) -> Kind:
    return Kind(signature={"inputs": inputs, "outputs": outputs, "dims": [BATCH, *dims]})


def said(live: Kind, candidate: Kind) -> list[str]:
    """What differs, as sentences."""
    return [f"{change.kind}: {change}" for change in changes_in_kind(live, candidate)]


PLAIN = signed()
TWO = [tensor("a", "batch", 4), tensor("b", "batch", 4)]
WORDS = [tensor("tokens", "batch", "length", dtype="int64")]
TAGS = [tensor("tags", "batch", "length", 5)]


@pytest.mark.parametrize(
    ("live", "candidate", "expected"),
    [
        (PLAIN, signed([tensor("x", "batch", 5)]), "input x: float32 [batch, 8] → float32 [batch, 5]"),
        (PLAIN, signed(outputs=[tensor("logits", "batch", 4)]), "logits: float32 [batch, 3] → float32 [batch, 4]"),
        (PLAIN, signed([tensor("x", "batch", 8, dtype="float64")]), "input x: float32 [batch, 8] → float64 [batch, 8]"),
        (PLAIN, signed([tensor("x", "batch", 1, 8)]), "input x: float32 [batch, 8] → float32 [batch, 1, 8]"),
        (PLAIN, signed([*INPUTS, tensor("mask", "batch")]), "input mask: none → float32 [batch]"),
        (PLAIN, signed(outputs=[*OUTPUTS, tensor("h", "batch", 9)]), "output h: none → float32 [batch, 9]"),
        (PLAIN, signed(outputs=[tensor("logits", "batch", "logits_1")]), "→ float32 [batch, logits_1]"),
        (PLAIN, signed(outputs=[tensor("logits", 3)]), "output logits: float32 [batch, 3] → float32 [3]"),
        (signed(TWO), signed(TWO[::-1]), "order of inputs: a, b → b, a"),
        (signed(outputs=TWO), signed(outputs=TWO[::-1]), "order of outputs: a, b → b, a"),
        (
            signed(WORDS, TAGS, LENGTH), signed(WORDS, TAGS, {**LENGTH, "max": 128}),
            "sizes of input tokens axis 1: 1 to 512 → 1 to 128",
        ),
        (
            signed(WORDS, TAGS, LENGTH), signed(WORDS, TAGS, {**LENGTH, "min": 8}),
            "sizes of input tokens axis 1: 1 to 512 → 8 to 512",
        ),
        (
            signed(WORDS, TAGS, {**LENGTH, "max": None}), signed(WORDS, TAGS, LENGTH),
            "sizes of input tokens axis 1: 1 or more → 1 to 512",
        ),
        (
            signed(WORDS, TAGS, LENGTH), signed(WORDS, [tensor("tags", "batch", "tags_1", 5)], LENGTH),
            "output tags axis 1: length → tags_1",
        ),
        (
            signed([tensor("a", "batch", "m"), tensor("b", "batch", "n")]),
            signed([tensor("a", "batch", "m"), tensor("b", "batch", "m")]),
            "input a axis 1 and input b axis 1: sizes of their own → always the same size",
        ),
        (
            signed(WORDS, TAGS, LENGTH), signed([tensor("tokens", "batch", 64, dtype="int64")], TAGS, LENGTH),
            "input tokens: int64 [batch, length] → int64 [batch, 64]",
        ),
        (
            signed([tensor("x", "batch", 600)]), signed([tensor("x", "batch", "length")], OUTPUTS, LENGTH),
            "input x: float32 [batch, 600] → float32 [batch, length]",
        ),
    ],
)  # fmt: skip
def test_other_inputs_and_outputs_are_told(live: Kind, candidate: Kind, expected: str) -> None:
    (only,) = said(live, candidate)
    assert only.startswith("signature: ") and expected in only


def test_what_was_taken_and_given_before_still_is_and_that_is_no_change() -> None:
    wide = signed(WORDS, TAGS, {**LENGTH, "max": 1024})
    assert said(signed(WORDS, TAGS, LENGTH), wide) == []
    # Another name of the same thing, an input that takes more sizes, an output that happened to have one size.
    renamed = [tensor("tokens", "batch", "words", dtype="int64")]
    words = {**LENGTH, "name": "words"}
    assert said(signed(WORDS, TAGS, LENGTH), signed(renamed, [tensor("tags", "batch", "words", 5)], words)) == []
    assert said(PLAIN, signed([tensor("x", "batch", "length")], OUTPUTS, LENGTH)) == []
    assert said(signed(outputs=[tensor("y", "batch", "y_1")]), signed(outputs=[tensor("y", "batch", 12)])) == []
    assert said(PLAIN, PLAIN) == []


def counted(*labels: int, each: int = 100, outputs: list[Any] = OUTPUTS, classes: tuple[str, ...] = ()) -> Kind:
    return Kind(
        signature={"outputs": outputs}, labels=dict.fromkeys(map(str, labels), each), classes=classes
    )  # fmt: skip


def test_names_of_classes_are_compared_in_their_order() -> None:
    three, four = counted(classes=("bird", "cat", "dog")), counted(classes=("ant", "bird", "cat", "dog"))
    assert said(three, four) == ["labels: class 0: bird of 3 → ant of 4"]
    assert said(three, counted(classes=("bird", "dog", "cat"))) == ["labels: class 1: cat of 3 → dog of 3"]
    assert said(three, counted(classes=("bird", "cat"))) == ["labels: class 2: dog of 3 → none of 2"]
    # Names say more than counts: the rare class of the same names was not met that night.
    assert said(
        counted(0, 1, 2, classes=three.classes), counted(0, 1, classes=three.classes)  # type: ignore[arg-type]
    ) == []  # fmt: skip


def test_a_class_that_nobody_trained_on_before_is_told_although_the_outputs_are_the_same() -> None:
    roomy = [tensor("logits", "batch", 1000)]
    expected = "labels: trained on: 3 (0, 1, 2) → 4 (0, 1, 2, 3)"
    assert said(counted(0, 1, 2, outputs=roomy), counted(0, 1, 2, 3, outputs=roomy)) == [expected]
    assert said(counted(0, 1, 2, outputs=roomy), counted(0, 2, outputs=roomy)) == [
        "labels: trained on: 3 (0, 1, 2) → 2 (0, 2)"
    ]


def test_a_rare_class_that_comes_and_goes_is_chance() -> None:
    live, rare = counted(0, 1, 2, each=300), {"0": 300, "1": 300, "2": 300, "3": 9}
    roomy = {"outputs": [tensor("logits", "batch", 10)]}
    before = dataclasses.replace(live, signature=roomy)
    assert said(before, dataclasses.replace(before, labels=rare)) == []
    assert said(dataclasses.replace(before, labels=rare), before) == []
    assert len(said(before, dataclasses.replace(before, labels={**rare, "3": 11}))) == 1


def test_whole_numbers_that_are_no_classes_are_not_compared() -> None:
    ages = [tensor("age", "batch")]
    assert said(counted(*range(20, 60), outputs=ages), counted(*range(40, 90), outputs=ages)) == []
    # What a loss passes over, in padding and in masks.
    maps = [tensor("map", "batch", 21, 64, 64)]
    assert said(counted(0, 1, 2, outputs=maps), counted(-100, 0, 1, 2, 255, outputs=maps)) == []


def test_a_format_that_live_has_and_the_candidate_lacks_is_told_and_one_more_is_not() -> None:
    every = Kind(formats={"torchscript": "model.torchscript", "onnx": "model.onnx"})
    one = Kind(formats={"torchscript": "model.torchscript"})
    assert said(every, one) == ["formats: format onnx: model.onnx → none"]
    assert said(one, every) == []


def test_another_model_under_a_copied_name_is_told_by_what_it_is_made_of() -> None:
    first = Kind(model={"model.factory": "first:Net", "data.factory": "first:data"})
    second = Kind(model={"model.factory": "second:Net", "data.factory": "second:data"})
    assert said(first, second) == [
        "model: model.factory: first:Net → second:Net", "model: data.factory: first:data → second:data",
    ]  # fmt: skip
    # A copied folder whose factories have the same names, or the same library's model trained on something else.
    copied = {"model.factory": "net:Net", "data.factory": "net:data", "project folder": "churn"}
    assert said(Kind(model=copied), Kind(model={**copied, "project folder": "fraud"})) == [
        "model: project folder: churn → fraud"
    ]
    assert said(Kind(model=copied), Kind(model={**copied, "repository": "churn"})) == []


def test_a_higher_opset_or_ir_version_is_told_and_a_lower_one_is_not() -> None:
    older, newer = Kind(onnx={"opset": 18, "IR version": 9}), Kind(onnx={"opset": 20, "IR version": 10})
    assert said(older, newer) == ["runtime: ONNX opset: 18 → 20", "runtime: ONNX IR version: 9 → 10"]
    assert said(newer, older) == []


def test_what_a_release_does_not_record_differs_from_nothing() -> None:
    full = Kind(
        signature=signed(WORDS, TAGS, LENGTH).signature, formats={"onnx": "model.onnx"}, classes=("a", "b"),
        labels={"0": 50, "1": 50}, model={"model.factory": "net:Net", "repository": "r"}, onnx={"opset": 20},
    )  # fmt: skip
    nothing = Kind()
    assert changes_in_kind(nothing, full) == []
    # All it lacks for certain is the format.
    assert said(full, nothing) == ["formats: format onnx: model.onnx → none"]
    before_ranges = Kind(signature={"inputs": WORDS, "outputs": TAGS})
    assert said(before_ranges, signed(WORDS, TAGS, {**LENGTH, "max": 4})) == []


def test_a_release_tells_its_kind_in_its_files() -> None:
    documents = {
        JOB: {"model": {"factory": "net:Net", "args": {}}, "data": {"factory": "net:data"}},
        LINEAGE: {"project": {"repository": "churn", "folder": "."}, "onnx": {"opset": 20}},
        DATA: {"classes": ["a", "b"], "train": {"labels": {"0": 4, "1": 5}}},
        VERDICTS: {"validation_samples": 96},
    }
    manifest = Manifest(
        model="m", release="r", files={}, formats={"onnx": "model.onnx"}, signature=PLAIN.signature, metrics={"a": 0.5}
    )
    kind = Kind.of(manifest, lambda name: documents[name])
    assert kind == Kind(
        signature=PLAIN.signature, formats={"onnx": "model.onnx"}, classes=["a", "b"], labels={"0": 4, "1": 5},
        model={
            "model.factory": "net:Net", "data.factory": "net:data", "repository": "churn", "project folder": ".",
        },
        onnx={"opset": 20}, metrics={"a": 0.5}, samples=96,
    )  # fmt: skip
    # Another version may have written something else there.
    strange = Kind.of(manifest, lambda name: {"model": "net:Net", "project": None, "train": [], "onnx": "20"})
    assert strange.model == {} and strange.onnx == {} and strange.labels == {}


# ---- the live release against its own record


def scores(live: float, samples: int = 400, metric: str = "accuracy", **more: Any) -> RehearseResult:
    spread = {"accuracy": (live * (1 - live)) ** 0.5, "mean_squared_error": live}.get(metric)
    rehearsed: dict[str, Any] = {
        "verdicts": [], "candidate": {}, "live": {"onnx": {metric: live}}, "live_problem": "", "samples": samples,
        "live_spread": {metric: spread} if spread is not None else {},
        "constant": {"accuracy": 1 / 3, "mean_squared_error": 1.0},
    }  # fmt: skip
    return RehearseResult(**{**rehearsed, **more})


def contradicts(
    folder: Path, record: float, result: RehearseResult, samples: int = 400, metric: str = "accuracy"
) -> bool:
    custom = {"factory": "plain:own", "better": metric.rpartition("_")[2], "name": metric}
    known = metric in ("accuracy", "mean_squared_error")
    job, _ = load_job(write_project(folder, train={"epochs": 1, "metrics": [metric if known else custom]}))
    live = Kind(metrics={metric: record}, samples=samples)
    return live_score(job, result).contradictions(live, job.direction) != []


def test_a_live_release_that_scores_far_below_its_own_record_is_told_with_both_numbers(tmp_path: Path) -> None:
    job, _ = load_job(write_project(tmp_path))
    live = Kind(metrics={"accuracy": 0.96}, samples=400)
    (only,) = live_score(job, scores(0.08)).contradictions(live, job.direction)
    assert str(only) == "accuracy of the live release: 0.96 in its own record → 0.08 on these 400 samples"
    # To know nothing is enough.
    assert contradicts(tmp_path, 0.96, scores(1 / 3))


def test_a_model_that_ages_contradicts_nothing(tmp_path: Path) -> None:
    assert not contradicts(tmp_path, 0.96, scores(0.93))
    # Half of what it knew beyond the most frequent class would be 0.65.
    assert not contradicts(tmp_path, 0.96, scores(0.66)) and contradicts(tmp_path, 0.96, scores(0.6))
    assert not contradicts(tmp_path, 0.6, scores(0.96))
    # It never knew anything, so it has nothing to lose.
    assert not contradicts(tmp_path, 0.3, scores(0.05))


def test_what_may_be_chance_contradicts_nothing(tmp_path: Path) -> None:
    assert not contradicts(tmp_path, 1.0, scores(0.0, samples=1), samples=1)
    assert not contradicts(tmp_path, 0.9, scores(0.6, samples=10), samples=10)
    assert not contradicts(tmp_path, 0.40, scores(0.35, samples=100), samples=100)
    assert contradicts(tmp_path, 0.96, scores(0.08, samples=30), samples=30)
    # A record that does not say of how many samples it is.
    assert contradicts(tmp_path, 0.96, scores(0.08), samples=0)


def test_an_error_is_held_against_what_a_constant_answer_gives(tmp_path: Path) -> None:
    metric = "mean_squared_error"
    assert contradicts(tmp_path, 0.1, scores(2.0, metric=metric), metric=metric)
    assert not contradicts(tmp_path, 0.1, scores(0.3, metric=metric), metric=metric)
    assert contradicts(tmp_path, 0.1, scores(float("nan"), metric=metric), metric=metric)


def test_a_metric_in_user_code_has_to_be_half_as_good_or_ten_times_as_bad(tmp_path: Path) -> None:
    narrow = {"intervals": {"own_higher": Interval(low=0.5, high=0.6), "own_lower": Interval(low=0.5, high=0.6)}}
    for metric, record, far, near in (("own_higher", 0.9, 0.2, 0.5), ("own_lower", 0.1, 2.0, 0.5)):
        assert contradicts(tmp_path, record, scores(far, metric=metric, **narrow), metric=metric)
        assert not contradicts(tmp_path, record, scores(near, metric=metric, **narrow), metric=metric)
        # Nobody knows how sure that is.
        assert not contradicts(tmp_path, record, scores(far, metric=metric), metric=metric)
        assert not contradicts(tmp_path, record, scores(far, samples=20, metric=metric, **narrow), metric=metric)


def test_the_best_constant_answer_is_the_most_frequent_class_the_mean_or_the_median() -> None:
    assert constant_score("accuracy", torch.tensor([0, 1, 1, 2])) == 0.5
    assert constant_score("accuracy", torch.tensor([0.0, 1.0, 1.0, 1.0])) == 0.75
    # Padding is no answer.
    assert constant_score("accuracy", torch.tensor([[0, 1, 1, 1], [-100, -100, -100, -100]])) == 0.75
    columns = torch.tensor([[0.0, 10.0], [2.0, 10.0], [4.0, 10.0]])
    assert constant_score("mean_squared_error", columns) == pytest.approx((8 / 3 + 0) / 2)
    assert constant_score("mean_absolute_error", columns) == pytest.approx((4 / 3 + 0) / 2)


# ---- saying yes


def test_a_job_and_a_command_allow_what_can_differ_and_nothing_else(tmp_path: Path) -> None:
    assert get_args(Allowed) == KINDS
    assert load_job(write_project(tmp_path, release={"allow": list(KINDS)}))[0].release.allow == KINDS
    with pytest.raises(JobError, match=r"release\.allow"):
        load_job(write_project(tmp_path, release={"allow": ["signatures"]}))
    assert named_kinds(None) == [] and named_kinds(["labels"]) == ["labels"]
    with pytest.raises(RequestError, match=r"allow: expected some of signature, .*runtime; got labell"):
        require_kinds(["labels", "labell"])


CHANGES = [
    KindChange(kind="signature", of="output y", live="float32 [batch, 3]", candidate="float32 [batch, 4]"),
    KindChange(kind="labels", of="class 0", live="bird of 3", candidate="ant of 4"),
    KindChange(kind="signature", of="input x", live="none", candidate="int64 [batch]"),
]


def test_a_refusal_names_every_kind_that_nobody_allowed_and_both_ways_to_say_yes() -> None:
    error = refusal("digits", "prod", "a" * 20, "b" * 20, CHANGES, {"labels": "by release.allow"})
    assert "signature: output y: float32 [batch, 3] → float32 [batch, 4]; signature: input x" in error.message
    assert "`ship promote digits --from aaaaaaaa --to prod --allow signature --why …`" in error.message
    assert "release: {allow: [signature]}" in error.message and "class 0" not in error.message
    # The table has what was allowed too.
    assert "bird of 3" in error.table and "by release.allow" in error.table
    assert not_allowed(CHANGES, {}) == ["signature", "labels"] and not_allowed(CHANGES, dict.fromkeys(KINDS, "")) == []


def test_records_say_what_differed_and_how_it_was_allowed() -> None:
    told = in_words(CHANGES, {"labels": "by grace: looks good"})
    assert told == {
        "signature vs live": (
            "output y: float32 [batch, 3] → float32 [batch, 4]; input x: none → int64 [batch]"
        ),
        "labels vs live": "class 0: bird of 3 → ant of 4 (allowed by grace: looks good)",
    }  # fmt: skip
    # Metrics are compared with what is live in the same record.
    assert kinds_in({**told, "accuracy vs live": "0.9 against 0.8", "bytes": "8 files"}) == told


@pytest.mark.parametrize("was_live", [True, False])
def test_a_yes_allows_all_that_it_was_asked_about_and_the_channels_past_does_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_live: bool
) -> None:
    monkeypatch.setattr(moves, "last_move", lambda channel, release: object() if was_live else None)
    job, _ = load_job(write_project(tmp_path))
    run: Any = SimpleNamespace(channel=SimpleNamespace(model="digits", name="prod"))
    rehearsed = Rehearsed(
        job=job, published=Published(release="r1", sent_bytes=1, present_bytes=0, etags={}), result=scores(0.5),
        live="r2", changes=CHANGES, allowed={"labels": "by release.allow"},
    )  # fmt: skip
    assert rehearsed.asks_consent.endswith("another kind than what is live: signature.")

    def allowed(answer: Answer | None) -> Mapping[str, str]:
        return asyncio.run(_require_same_kind(run, rehearsed, answer)).allowed

    yes = Answer(approved=True, said="by grace: it has to be")
    assert allowed(yes) == {"labels": "by release.allow", "signature": "by grace: it has to be"}
    if was_live:
        assert allowed(None)["signature"] == "because it was live on prod before"
    else:
        with pytest.raises(GateError, match="digits prod: release r1 is of another kind than r2"):
            allowed(None)


def test_a_candidate_that_was_kept_for_its_kind_is_another_question_once_that_is_allowed() -> None:
    inputs = Inputs(code="c", data="d", config="j", environment={"torch": "2.13"})
    assert inputs.digest("") == inputs.digest("", ()) != inputs.digest("", {"signature"})
    assert inputs.digest("", ["labels", "formats"]) == inputs.digest("", {"formats", "labels"})


# ---- where it is recorded


def test_an_onnx_file_says_what_it_asks_of_a_runtime(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    x = ir.Value(name="x", shape=ir.Shape([1000]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = ir.Value(name="w", const_value=ir.tensor([0.5] * 1000, name="w"))
    graph = ir.Graph([x], [x], nodes=[], initializers=[weights], opset_imports={"": 20, "com.microsoft": 1}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)
    found = onnx_versions(path)
    assert found == {"IR version": 10, "opset": 20} and path.stat().st_size > 4000
    path.write_bytes(path.read_bytes()[:-1])
    assert onnx_versions(path) in ({}, found)
    for nonsense in (b"", b"\x00", b"no model at all", b"\xff" * 40, b"\x0a\xff\xff\x03"):
        path.write_bytes(nonsense)
        assert onnx_versions(path) == {}


def test_operators_of_other_domains_are_no_opset_of_onnx(tmp_path: Path) -> None:
    other, own = b"\x0a\x03abc\x10\x63", b"\x10\x12"
    path = tmp_path / "model.onnx"
    fields = b"\x08\x09" + b"".join(b"\x42" + bytes([len(one)]) + one for one in (other, own, other))
    path.write_bytes(b"\x3a\x05graph" + fields)
    assert onnx_versions(path) == {"IR version": 9, "opset": 18}


def test_a_project_is_known_by_the_name_of_its_repository_and_its_folder_there(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    project = tmp_path / "services" / "churn"
    project.mkdir(parents=True)
    assert project_place(project) == {}
    git("init", "--quiet")
    assert project_place(project) == {"folder": "services/churn"} and project_place(tmp_path) == {"folder": "."}
    git("remote", "add", "origin", "x")
    for address in ("git@host:ada/models.git", "https://host/acme/models/", "/srv/git/models.git"):
        git("remote", "set-url", "origin", address)
        # A fork and a mirror are the same project.
        assert project_place(project) == {"repository": "models", "folder": "services/churn"}


def test_the_names_of_classes_are_those_of_the_dataset() -> None:
    class Pictures(TensorDataset):
        classes: Any

    pictures = Pictures(torch.zeros(4))
    pictures.classes = ["cat", "dog"]
    assert class_names(pictures) == class_names(Subset(Subset(pictures, [0, 1]), [0])) == ["cat", "dog"]
    assert class_names(TensorDataset(torch.zeros(4))) == []
    for other in ({"cat": 0}, [("tench", "Tinca tinca")], 3, None, lambda: ["cat"]):
        pictures.classes = other
        assert class_names(pictures) == []
    assert json.dumps(class_names(pictures)) == "[]"

"""Small projects are exported for real and the artifacts held against them in the clean room.

Where what is asked does not depend on weights, they are those of the factory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.projects import write_project
from tests.support.worker_stages import EACH_FORMATS, FORMATS, ONE, OpenStages
from torchworker.contract import FORMAT_FILES
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.release.archives import ARCHIVES, find_fault
from train_and_ship.registry.verdicts import verdict_table


def test_every_format_agrees_with_the_model_at_batch_one_the_captured_and_a_larger_one(stages: OpenStages) -> None:
    opened = stages(gates={"accuracy": {"min": 0.0}})
    opened.export(*FORMATS)
    result = opened.validate()

    assert result.passed
    assert result.reference == "the model in float64"
    for kind in FORMATS:
        mine = [verdict for verdict in result.verdicts if verdict.format == kind]
        assert [(v.gate, v.case) for v in mine] == [
            ("parity", "batch 1"),
            ("parity", "batch 8"),
            ("parity", "batch 17"),
            ("parity", "28 probes"),
            ("parity", "called again"),
            ("parity", "96 samples"),
            ("parity", "predictions"),
            ("accuracy", "96 samples"),
        ]
        assert set(result.metrics[kind]) == {"accuracy"}
        if kind in ARCHIVES:
            # As it is looked through when it comes back from a bucket.
            assert find_fault(opened.folder / "export" / FORMAT_FILES[kind], kind) is None
    assert len({values["accuracy"] for values in result.metrics.values()}) == 1


def test_onnx_is_one_file_with_named_inputs_outputs_and_a_dynamic_batch(stages: OpenStages) -> None:
    opened = stages("""
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 3)
            def forward(self, features):
                return {"logits": self.linear(features), "scaled": self.linear(features) * 2}
        def build_model():
            return Named()
        def loss(outputs, target):
            return nn.functional.cross_entropy(outputs["logits"], target)
    """, trained=False, train={**ONE, "loss": {"factory": "plain:loss"}, "metrics": ["accuracy"]})  # fmt: skip
    opened.export("onnx", "pt2")
    graph = onnx.load(str(opened.folder / "export" / "model.onnx"), load_external_data=False).graph

    assert [item.name for item in graph.input] == ["features"]
    assert [item.name for item in graph.output] == ["logits", "scaled"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not list((opened.folder / "export").glob("*.data"))
    assert opened.validate().passed


def test_an_artifact_with_other_weights_fails_parity_in_every_case(stages: OpenStages) -> None:
    opened = stages(trained=False)
    opened.export("torchscript")
    path = opened.folder / "export" / "model.torchscript"
    program = torch.jit.load(str(path))
    with torch.no_grad():
        next(program.parameters()).add_(1e-4)
    program.save(str(path))
    result = opened.validate()

    parity = {verdict.case: verdict.passed for verdict in result.verdicts if verdict.gate == "parity"}
    assert [case for case, passed in parity.items() if passed] == ["predictions"]
    assert not result.passed


def test_torchscript_is_run_without_python_and_held_to_the_same_rule(stages: OpenStages, runner: Path) -> None:
    opened = stages(trained=False)
    opened.export("torchscript", "onnx")
    result = opened.validate("required", str(runner))
    assert result.passed
    mine = [verdict.case for verdict in result.verdicts if verdict.format == "torchscript in C++"]
    assert mine == ["batch 1", "batch 8", "batch 17", "28 probes", "called again", "96 samples"]
    assert "torchscript in C++" not in result.metrics

    golden = opened.folder / "export" / "golden.safetensors"
    tensors = load_file(golden)
    tensors["batch_17.eager.output"] += 1e-4
    tensors["batch_17.float64.output"] += 1e-4
    save_file(tensors, golden)
    failed = [verdict.format for verdict in opened.validate("required", str(runner)).verdicts if not verdict.passed]
    assert set(failed) == {"torchscript", "torchscript in C++", "onnx"}


def test_a_check_that_this_machine_cannot_run_is_not_passed(stages: OpenStages) -> None:
    opened = stages(trained=False)
    opened.export("torchscript")
    possible = opened.validate("when_possible", no_runner="no C++ compiler on this machine")
    (verdict,) = [verdict for verdict in possible.verdicts if not verdict.passed]
    assert (verdict.format, verdict.ran, verdict.note) == (
        "torchscript in C++",
        False,
        "not run: no C++ compiler on this machine",
    )
    assert possible.passed and "not run" in verdict_table(possible.verdicts).text()
    assert not opened.validate("required", no_runner="no C++ compiler on this machine").passed
    # Nor is one that has no artifact to be run on.
    assert opened.result is not None
    opened.result = replace(opened.result, artifacts={})
    (failed,) = opened.validate("required").verdicts
    assert (failed.format, failed.ran, failed.passed) == ("in C++", True, False) and "torchscript, aoti" in failed.note


def test_an_artifact_that_cannot_be_loaded_is_a_failed_gate_not_a_crash(stages: OpenStages) -> None:
    opened = stages(trained=False)
    opened.export("onnx", "torchscript")
    (opened.folder / "export" / "model.onnx").write_bytes(b"not a model")
    result = opened.validate()

    failed = [verdict for verdict in result.verdicts if not verdict.passed]
    assert [(verdict.format, verdict.case, verdict.measured) for verdict in failed] == [("onnx", "load", None)]


def test_a_gate_that_fails_says_what_was_measured_and_the_limit(stages: OpenStages) -> None:
    opened = stages(gates={"accuracy": {"min": 0.999}})
    opened.export("onnx")
    result = opened.validate()

    (failed,) = [verdict for verdict in result.verdicts if not verdict.passed]
    assert failed.gate == "accuracy" and failed.limit == ">= 0.999"
    assert failed.measured is not None and failed.measured < 0.999


ACROSS: dict[str, Any] = {"parity": {"coupled": "allowed"}}
"""A branch on the sum of a batch looks across it."""
BRANCH = """
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
        def forward(self, x):
            if x.sum() > 0:
                return self.linear(x)
            return self.linear(-x){tail}
    def build_model():
        return Branches()
"""


def test_a_branch_on_data_is_scripted_exactly_and_refused_by_torch_export_with_the_line(stages: OpenStages) -> None:
    opened = stages(BRANCH.format(tail=""), trained=False, **ACROSS)
    assert opened.export("torchscript")["torchscript"].method == "torch.jit.script"
    assert opened.validate().passed

    with pytest.raises(JobError, match=r"(?s)torch.export cannot capture.*plain.py:\d+.*torch\.cond"):
        opened.export("pt2")
    with pytest.raises(JobError, match=r"torch.export cannot capture"):
        opened.export("onnx")


def test_auto_leaves_out_what_cannot_capture_the_model_and_says_why(stages: OpenStages) -> None:
    opened = stages(BRANCH.format(tail=""), trained=False, export={"formats": "auto"}, **ACROSS)
    assert set(opened.export(*opened.job.export.wanted)) == {"torchscript"}
    assert opened.result is not None
    assert set(opened.result.left_out) == {"onnx", "pt2", "aoti"}
    for why in opened.result.left_out.values():
        assert re.search(r"data-dependent.*\(plain.py:\d+, in forward: if x.sum\(\) > 0:\).*torch.cond", why)
    assert opened.validate().passed


def test_auto_with_nothing_that_fits_fails_with_every_reason(stages: OpenStages) -> None:
    opened = stages(
        BRANCH.format(tail=" + float(x.numpy().size) * 0"), trained=False, export={"formats": "auto"}, **ACROSS
    )
    with pytest.raises(JobError, match=r"(?s)TorchScript cannot capture.*torch.export cannot capture"):
        opened.export("torchscript", "pt2")


def test_a_trace_that_would_bake_in_a_branch_is_refused(stages: OpenStages) -> None:
    # A numpy round trip cannot be scripted, so only tracing is left, and the branch would be frozen.
    opened = stages(BRANCH.format(tail=" + float(x.numpy().size) * 0"), trained=False, **ACROSS)
    with pytest.raises(JobError, match=r"trace: it would bake in a decision made on the example data \(plain.py:\d+\)"):
        opened.export("torchscript")


def model(body: str) -> str:
    head = "class M(nn.Linear):\n    def forward(self, x):\n"
    return head + textwrap.indent(textwrap.dedent(body), "        ") + "\ndef build_model():\n    return M(4, 3)\n"


def test_randomness_in_forward_is_refused(stages: OpenStages) -> None:
    opened = stages(model("return super().forward(x + torch.rand_like(x))"), trained=False)
    with pytest.raises(JobError, match="differs between two calls"):
        opened.export()


def test_an_input_changed_in_place_is_refused(stages: OpenStages) -> None:
    opened = stages(model("return super().forward(x.mul_(1.5))"), trained=False)
    with pytest.raises(JobError, match=r"differs between two calls|changes its input 'x' in place"):
        opened.export()


def test_state_kept_between_calls_is_refused(stages: OpenStages) -> None:
    opened = stages("""
        class M(nn.Linear):
            def __init__(self):
                super().__init__(4, 3)
                self.register_buffer("calls", torch.zeros(()))
            def forward(self, x):
                if len(x) == 8:
                    self.calls.add_(1)
                return super().forward(x)
        def build_model():
            return M()
    """, trained=False)  # fmt: skip
    with pytest.raises(JobError, match=r"forward changes the buffer .calls. in eval mode: plain.py:22"):
        opened.export()


def test_a_model_that_fixes_float32_inside_is_compared_with_eager_and_says_so(stages: OpenStages) -> None:
    opened = stages(
        model("return super().forward(x.float()) if self.weight.dtype == torch.float32 else x.half()"), trained=False
    )
    opened.export("onnx")
    result = opened.validate()

    assert "float32 eager" in result.reference
    assert result.passed


UNSAVED = {
    "a random projection that is a plain attribute": (
        """
        import numpy
        class M(nn.Linear):
            def __init__(self):
                super().__init__(4, 3)
                self.projection = torch.from_numpy(numpy.random.default_rng().normal(size=(4, 4))).float()
            def forward(self, x):
                return super().forward(x @ self.projection)
        def build_model():
            return M()
    """
    ),
    "a buffer that is not persistent": (
        """
        class M(nn.Linear):
            def __init__(self):
                super().__init__(4, 3)
                self.register_buffer("scale", torch.ones(()), persistent=False)
            def forward(self, x):
                if self.training:
                    self.scale += 0.5
                return super().forward(x) * self.scale
        def build_model():
            return M()
    """
    ),
    "a value remembered from the first batch": (
        """
        class M(nn.Linear):
            mean = None
            def forward(self, x):
                if self.mean is None:
                    self.mean = x.mean() + float(self.training)
                return super().forward(x - self.mean)
        def build_model():
            return M(4, 3)
    """
    ),
}


@pytest.mark.parametrize("hidden", UNSAVED)
def test_a_model_that_its_weights_do_not_bring_back_is_refused(stages: OpenStages, hidden: str) -> None:
    opened = stages(UNSAVED[hidden])
    with pytest.raises(
        JobError, match="rebuilt from its weights, the model gives other outputs than when it was trained"
    ):
        opened.export("torchscript")


def test_weights_that_no_longer_fit_the_code_are_refused_with_the_way_out(stages: OpenStages) -> None:
    opened = stages()
    code = opened.job_file.with_name("plain.py")
    # Of another length: compiled modules are told apart by size and the second in which they were written.
    code.write_text(code.read_text().replace("def build_model(width=8)", "def build_model(width=16)"))
    with pytest.raises(
        JobError, match=r"the trained weights do not fit the model as it is now: (?s:.*)start a new run"
    ):
        opened.export("torchscript")


def test_a_decision_that_capture_hides_is_caught_on_samples_it_did_not_see(stages: OpenStages) -> None:
    opened = stages(model("""
        import numpy
        # 1.2 is above what is in the batch of capture.
        sign = float((numpy.from_dlpack(x.detach())[:, 0] > 1.2).any())
        return super().forward(x) * (1 + sign)
    """), trained=False, **ACROSS)  # fmt: skip
    opened.export("torchscript")
    result = opened.validate()

    seen = {verdict.case: verdict.passed for verdict in result.verdicts if verdict.gate == "parity"}
    assert not seen["96 samples"]
    assert not result.passed


def test_user_code_with_threads_is_exported_in_new_interpreters(stages: OpenStages) -> None:
    opened = stages("""
        import threading, time
        def chatter():
            while True:
                print("x" * 1000)
                time.sleep(0.001)
        threading.Thread(target=chatter, daemon=True).start()
    """, trained=False)  # fmt: skip
    opened.export("torchscript", "onnx")
    assert opened.validate().passed


def test_one_logit_in_a_column_has_the_accuracy_of_the_same_logits_without_it(stages: OpenStages) -> None:
    extra = """
        original = build_dataset
        def build_dataset(split):
            inputs, target = original(split).tensors
            return TensorDataset(inputs, (target > 0).float())
        def build_model():
            return nn.Sequential(nn.Linear(4, 1)COLUMN)
        def loss(outputs, target):
            return nn.functional.binary_cross_entropy_with_logits(outputs.reshape(-1), target)
    """
    job = {"train": {**ONE, "loss": {"factory": "plain:loss"}, "metrics": ["accuracy"]}}
    accuracies = []
    for column in ("", ", nn.Flatten(0)"):
        opened = stages(extra.replace("COLUMN", column), **job)
        opened.export("torchscript")
        accuracies.append(opened.validate().metrics["torchscript"]["accuracy"])
    assert accuracies[0] == accuracies[1] > 0.5


@EACH_FORMATS
def test_a_project_folder_that_holds_the_python_environment_is_validated(
    stages: OpenStages, formats: tuple[str, ...]
) -> None:
    opened = stages(trained=False)
    opened.export(*formats)
    opened.project_folder = Path(sys.prefix).parent
    assert opened.validate().passed


def test_the_clean_room_cannot_import_user_code_by_name_or_from_its_folder(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "helper.py").write_text("")
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from torchworker.parity.clean_room import forbid_user_code\n"
        f"forbid_user_code(['plain'], {str(tmp_path)!r})\n"
        "for name in ('plain', 'helper'):\n"
        "    try:\n"
        "        __import__(name)\n"
        "    except ImportError as error:\n"
        "        print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ImportError", "ModuleNotFoundError"]


def test_a_job_of_installed_libraries_alone_is_trained_exported_and_proven(stages: OpenStages) -> None:
    opened = stages(
        model={"factory": "torch.nn:Linear", "args": {"in_features": 4, "out_features": 3}},
        train={
            **ONE,
            "optimizer": {"factory": "torch.optim:SGD", "args": {"momentum": 0.9}},
            "loss": {"factory": "torch.nn:CrossEntropyLoss", "args": {"label_smoothing": 0.1, "weight": [1, 2, 3]}},
            "schedule": {"factory": "torch.optim.lr_scheduler:OneCycleLR", "args": {"max_lr": 0.1}},
            "metrics": ["accuracy"],
        },
    )
    opened.export("torchscript", "onnx")
    assert opened.validate().passed


def test_a_model_that_returns_a_dataclass_is_trained_by_two_processes_exported_and_proven(stages: OpenStages) -> None:
    extra = """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Answer:
            loss: torch.Tensor | None
            logits: torch.Tensor
            hidden: tuple = ()
        class Answers(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
            def forward(self, x):
                hidden = self.first(x).relu()
                return Answer(None, self.second(hidden), (hidden,))
        def build_model():
            return Answers()
        def loss(outputs, target):
            return nn.functional.cross_entropy(outputs.logits, target)
    """
    train = {**ONE, "processes": 2, "loss": {"factory": "plain:loss"}, "metrics": ["accuracy"]}
    opened = stages(extra, train=train)
    opened.export("torchscript", "onnx", "pt2")
    assert opened.result is not None and [spec.name for spec in opened.result.outputs] == ["logits", "hidden_0"]
    assert opened.validate().passed


def test_what_onnx_cannot_hold_is_left_out_by_auto_and_refused_by_name(stages: OpenStages) -> None:
    extra = """
        class Passes(nn.Linear):
            def forward(self, x):
                return {"logits": super().forward(x), "x": x}
        def build_model():
            return Passes(4, 3)
        def loss(outputs, target):
            return nn.functional.cross_entropy(outputs["logits"], target)
    """
    opened = stages(extra, trained=False, export={"formats": "auto"}, train={**ONE, "loss": {"factory": "plain:loss"}})
    assert set(opened.export("torchscript", "onnx")) == {"torchscript"}
    assert opened.result is not None and "has the name of an input" in opened.result.left_out["onnx"]
    assert opened.validate().passed


RARE = """
    class Fraud(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(4, 1)
            nn.init.constant_(self.score.bias, -11.5)
        def forward(self, x):
            return torch.sigmoid(self.score(x))
    def build_model():
        return Fraud()
    def build_dataset(split):
        random = torch.Generator().manual_seed(0 if split == "train" else 1)
        return TensorDataset(torch.randn(96, 4, generator=random), torch.zeros(96, 1))
"""


@pytest.mark.soak
@pytest.mark.parametrize("relative", [False, True])
def test_a_model_of_rare_events_passes_in_units_of_one_and_not_in_its_own_in_onnx(
    stages: OpenStages, relative: bool
) -> None:
    train = {**ONE, "loss": {"factory": "torch.nn.functional:binary_cross_entropy"}, "learning_rate": 1e-6}
    opened = stages(RARE, train=train, parity={"relative": relative}, data={"factory": "plain:build_dataset"})
    opened.export("onnx", "pt2", "torchscript")
    failed = {item.format for item in opened.validate().verdicts if not item.passed}
    assert failed == ({"onnx"} if relative else set())

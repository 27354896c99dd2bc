"""ExecuTorch programs: lowered, read back, held against the declaration and the model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.capture_subject import subject
from tests.support.projects import REPOSITORY
from tests.support.worker_stages import OpenStages, WorkerStages
from torchworker.exporters import executorch
from torchworker.parity.reference import golden_sizes
from torchworker.process.failure import UserError
from torchworker.runtimes.load import load_artifact
from train_and_ship.infra.errors import JobError

if importlib.util.find_spec("executorch") is None:
    pytest.skip("ExecuTorch is not installed: pip install executorch==1.5.1", allow_module_level=True)

IMAGES = """
    class Images(torch.utils.data.Dataset):
        def __init__(self, split):
            generator = torch.Generator().manual_seed(0 if split == "train" else 1)
            self.pictures = torch.randn(64, 3, 9, 8, generator=generator)
        def __len__(self):
            return 64
        def __getitem__(self, index):
            picture = self.pictures[index]
            return {"picture": picture}, (picture.mean() > 0).long()
    def build_dataset(split):
        return Images(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.classify = nn.Linear(8, 2)
        def forward(self, picture):
            return self.classify(self.features(picture).mean((2, 3)))
    def build_model():
        return M()
"""
HEIGHT = {"height": {"axes": {"picture": 2}, "min": 3, "max": 24}}


def images(stages: OpenStages, trained: bool = True) -> WorkerStages:
    asked = {"formats": ["executorch"], "batch": 8, "max_batch": 20, "dynamic": HEIGHT}
    return stages(IMAGES, trained=trained, export=asked, gates={"accuracy": {"min": 0.0}})


LOWER = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from tests.support.capture_subject import subject
from torchworker.exporters import executorch
from torchworker.exporters.program import capture
from torchworker.exporters.sizes import ranges
with torch.no_grad():
    print(executorch.executorch(subject(), Path(sys.argv[1])).method)
    made = subject()
    captured = capture(made)
    print(executorch.narrowed(made, ranges(captured.program, made), "") or "nothing is narrowed by capture")
    # As in ExecuTorch's manual: with this machine's NNPACK kernels in mind, which are for batches below 16.
    with captured.assuming():
        final = to_edge_transform_and_lower(captured.program, partitioner=[XnnpackPartitioner()]).to_executorch()
    print(executorch.narrowed(made, ranges(final.exported_program(), made), "") or "nothing is said to be narrowed")
    usual = Path(sys.argv[1] + ".usual")
    usual.write_bytes(final.buffer)
    print(executorch.narrowed(made, executorch.planned(made, usual), "the file has memory for"))
"""


@dataclass(frozen=True)
class Lowered:
    path: Path
    method: str
    by_capture: str
    """What is narrowed, in words."""
    said_as_usual: str
    found_as_usual: str


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Made in a process of its own, as an export is: it forks, which a process whose torch has threads cannot."""
    path = tmp_path_factory.mktemp("program") / "model.pte"
    command = [sys.executable, "-W", "ignore", "-c", LOWER, str(path)]
    said = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=240).stdout
    return Lowered(path, *said.splitlines()[-4:])


def test_a_program_is_proven_up_to_the_largest_size_of_every_dimension(stages: OpenStages) -> None:
    opened = images(stages, trained=False)
    made = opened.export("executorch")["executorch"]
    assert made.file == "model.pte" and made.method == "torch.export, non-strict → ExecuTorch, XNNPACK"

    result = opened.validate()
    assert result.passed, result.verdicts
    assert [verdict.case for verdict in result.verdicts][:3] == ["batch 1", "batch 8", "batch 20"]
    assert opened.result is not None
    assert {dim.name: (dim.min, dim.max) for dim in opened.result.dims} == {"batch": (1, 20), "height": (3, 24)}


def test_a_program_with_one_weight_that_is_slightly_off_is_refused(stages: OpenStages) -> None:
    opened = images(stages)
    opened.export("executorch")
    path = opened.folder / "export" / "model.pte"
    bias = load_file(opened.folder / "train" / "weights.safetensors")["classify.bias"]
    content = path.read_bytes()
    assert content.count(bias.numpy().tobytes()) == 1
    path.write_bytes(content.replace(bias.numpy().tobytes(), (bias + 1e-4).numpy().tobytes()))

    result = opened.validate()
    assert not result.passed
    assert {item.case for item in result.verdicts if not item.passed} >= {"batch 1", "batch 8", "batch 20"}


@pytest.mark.parametrize(
    ("picture", "got"),
    [
        (torch.randn(21, 3, 9, 8), r"float32 \[21, 3, 9, 8\]"),
        (torch.randn(2, 3, 25, 8), r"float32 \[2, 3, 25, 8\]"),
        (torch.randn(2, 3, 2, 8), r"float32 \[2, 3, 2, 8\]"),
        (torch.randn(2, 3, 8, 9), r"float32 \[2, 3, 8, 9\]"),
        (torch.randn(2, 3, 9, 8, dtype=torch.float64), "float64"),
    ],
)
def test_inputs_that_the_runtime_itself_would_answer_are_held_against_the_signature_in_the_file(
    lowered: Lowered, picture: Tensor, got: str
) -> None:
    with pytest.raises(ValueError, match=rf"input picture: expected float32 .*'height': \[3, 24\].* got {got}"):
        load_artifact("executorch", lowered.path, 1)({"picture": picture})


def test_xnnpack_is_taken_where_it_is_the_model(lowered: Lowered) -> None:
    assert lowered.method == "torch.export, non-strict → ExecuTorch, XNNPACK"


def test_answers_do_not_share_memory_with_later_ones(lowered: Lowered) -> None:
    call = load_artifact("executorch", lowered.path, 1)
    first, second = torch.randn(20, 3, 24, 8), torch.randn(5, 3, 9, 8)
    (kept,) = call({"picture": first})
    copied = kept.clone()
    call({"picture": second})
    assert torch.equal(kept, copied) and torch.equal(call({"picture": first})[0], copied)


def test_a_range_that_lowering_narrows_silently_is_named_with_what_was_declared(lowered: Lowered) -> None:
    assert lowered.by_capture == "nothing is narrowed by capture"
    # The lowered program does not say it: only the file does.
    assert lowered.said_as_usual == "nothing is said to be narrowed"
    assert lowered.found_as_usual == (
        "export.max_batch: 1 to 20 is declared for batch, and the file has memory for 1 to 15"
    )


def test_a_file_with_memory_for_less_than_is_declared_is_refused(lowered: Lowered) -> None:
    assert executorch.narrowed(subject(), executorch.planned(subject(), lowered.path), "") == ""
    larger = subject(batch=40, height=30)
    assert executorch.narrowed(larger, executorch.planned(larger, lowered.path), "the file has memory for") == (
        "export.max_batch: 1 to 40 is declared for batch, and the file has memory for 1 to 20; "
        "export.dynamic.height: 3 to 30 is declared for height, and the file has memory for 3 to 24"
    )


def test_a_dimension_without_a_largest_size_is_refused_with_its_key(stages: OpenStages, tmp_path: Path) -> None:
    opened = stages(IMAGES, trained=False)
    with pytest.raises(JobError, match=r"export.max_batch: expected the largest size that users will send"):
        opened.export("executorch")
    with pytest.raises(UserError, match=r"export.dynamic.height.max: expected the largest size"):
        executorch.executorch(subject(height=None), tmp_path / "model.pte")


def test_without_the_library_the_format_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(UserError, match=r"executorch needs the library .*executorch==1\.5\.1"):
        executorch.executorch(subject(), tmp_path / "model.pte")


def test_golden_batches_end_at_the_largest_that_is_declared() -> None:
    assert golden_sizes(8, None) == [1, 8, 17]
    assert golden_sizes(8, 20) == [1, 8, 20]
    assert golden_sizes(8, 8) == [1, 8]

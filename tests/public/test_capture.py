"""Public architectures are captured by torch.export: as pt2 and as ONNX, at every declared size of a batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from tests.support.public import architectures
from tests.support.public.architectures import build_dataset, build_model
from torchworker.contract import DynamicDim, Project, Reference
from torchworker.exporters.agreement import disagreement
from torchworker.exporters.onnx_export import onnx_model
from torchworker.exporters.program import capture
from torchworker.exporters.pt2 import pt2
from torchworker.exporters.subject import Subject
from torchworker.process.failure import UserError
from torchworker.project.signature import resized
from torchworker.project.user_code import forward, name_inputs, name_outputs
from torchworker.runtimes.load import load_artifact

pytestmark = pytest.mark.public

CAPTURED = {
    "graph nets, sparse": None,
    "ODE, Runge-Kutta": None,
    "masked autoregressive flow": None,
    # Its upsampling asks for batches of 64 and more.
    "U-Net of diffusion": 63,
    "BERT": None,
    "SegFormer": None,
}
"""The largest batch of each; None for no limit."""


def subject_of(name: str, largest: int | None) -> Subject:
    nothing = Reference(target="a:b", where="model.factory")
    folder = str(Path(architectures.__file__).parent)
    project = Project(name="plain", folder=folder, model=nothing, data=nothing, loss="mse_loss", metrics=[])
    torch.manual_seed(0)
    model = build_model(name).eval().requires_grad_(False)
    data = build_dataset("train", name)
    inputs = name_inputs(model, default_collate([data[index][0] for index in range(8)]), project)
    return Subject(
        model=model,
        inputs=inputs,
        outputs=list(name_outputs(forward(model, inputs, project), project)),
        dims=[DynamicDim(name="batch", min=1, max=largest, axes={name: (0,) for name in inputs})],
        project=project,
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "largest"), CAPTURED.items(), ids=CAPTURED)
def test_files_of_a_public_architecture_give_its_answers_at_every_size(
    name: str, largest: int | None, tmp_path: Path
) -> None:
    subject = subject_of(name, largest)
    for kind, write in (("pt2", pt2), ("onnx", onnx_model)):
        write(subject, tmp_path / kind)
        call = load_artifact(kind, tmp_path / kind, 1)
        assert disagreement(call, subject) == "", kind
        for batch in (1, 2, 3, 16, 63, *([64, 130] if largest is None else [])):
            given = resized(subject.inputs, subject.dims, {"batch": batch})
            expected = name_outputs(forward(subject.model, given, subject.project), subject.project)
            for found, wanted in zip(call(given), expected.values(), strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_what_cannot_be_captured_at_every_batch_says_which_it_can_and_where_the_library_decides() -> None:
    with pytest.raises(UserError) as caught:
        capture(subject_of("U-Net of diffusion", None))
    told = str(caught.value)
    assert "at batch 64 the model runs and the program would refuse" in told
    assert "because of batch < 64 (architectures.py:" in told
    assert "; in diffusers/models/upsampling.py:" in told and "if hidden_states.shape[0] >= 64:" in told
    assert "declare the sizes that the program takes (export.max_batch: 63)" in told


@torch.no_grad()
def test_a_pt2_of_a_model_of_transformers_is_loaded_without_transformers(tmp_path: Path) -> None:
    subject = subject_of("BERT", None)
    pt2(subject, tmp_path / "model.pt2")
    script = (
        "import sys, torch\n"
        "sys.modules['transformers'] = None\n"
        "program = torch.export.load(sys.argv[1])\n"
        "ids = torch.ones(3, 12, dtype=torch.long)\n"
        "said = program.module()(ids, ids)\n"
        "print(type(said).__name__, list(said), *(list(tensor.shape) for tensor in said.values()))\n"
        "assert {name for name, _ in program.named_parameters()} == set(sys.argv[2].split())\n"
    )
    weights = " ".join(name for name, _ in subject.model.named_parameters())
    said = subprocess.check_output([sys.executable, "-P", "-c", script, tmp_path / "model.pt2", weights], text=True)
    assert said.strip() == "dict ['logits'] [3, 5]"

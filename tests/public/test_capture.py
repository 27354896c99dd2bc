"""Public architectures get every format, at every declared size of a batch, or a refusal that is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.public.architectures import ARCHITECTURES, Architecture
from tests.support.public.exporting import FORMATS, became, mistakes, subject_of
from torchworker.exporters.program import capture
from torchworker.exporters.pt2 import pt2
from torchworker.process.failure import UserError

pytestmark = pytest.mark.public


@pytest.mark.parametrize("asked", ARCHITECTURES, ids=lambda item: f"{item.library}: {item.name}")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_a_public_architecture_gives_its_answers_at_every_batch(asked: Architecture, kind: str) -> None:
    assert mistakes(asked, {kind: became(asked.name, kind)}) == []


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

"""The exported program itself, as torch.export.save writes it."""

from __future__ import annotations

from pathlib import Path

import torch

from torchworker.exporters.program import capture
from torchworker.exporters.subject import Made, Subject


def pt2(subject: Subject, path: Path) -> Made:
    """Write the program and say how it was captured. Raises UserError when torch.export cannot capture the model."""
    captured = capture(subject)
    torch.export.save(captured.program, str(path))
    return Made(captured.method)

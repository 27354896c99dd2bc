#!/usr/bin/env bash
# torch 2.13.0: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) averages every buffer as if
# it were a running statistic. A causal mask, zeros and -inf as a buffer, becomes NaN at the first update that averages
# (-inf less -inf), and every answer with it. Buffers of whole numbers (token tables, position ids, num_batches_tracked)
# are averaged too and cut off, so that a table of constants is off by one in many places though it never changed. Nothing
# is said, and the loss that is watched is that of the model that trains, not of the average. use_buffers=True is what the
# documentation names as the way to have BatchNorm's running statistics right without a second pass over the data
# (update_bn). What is safe: average floating buffers that are finite, and copy the others.
# seen: 2026-11-29: after two updates of an unchanged model: -inf in the mask 6 of 6 became NaN
# seen: 2026-11-29: whole numbers 0 to 49,999: 11,999 are another number, all one less
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        self.register_buffer("table", torch.arange(50_000))


model = Model()
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
for _ in range(2):
    average.update_parameters(model)
masked = model.mask.isinf()
lost = int((masked & average.module.mask.isnan()).sum())
off = average.module.table - model.table
print(f"-inf in the mask: {lost} of {int(masked.sum())} became NaN")
print(f"whole numbers: {int((off != 0).sum())} of {len(off)} are another number, the smallest difference {int(off.min())}")
assert lost == int(masked.sum()) == 6, "the mask survives now"
assert int((off != 0).sum()) > 0 and int(off.min()) == -1 and int(off.max()) == 0, "whole numbers survive now"
PYTHON

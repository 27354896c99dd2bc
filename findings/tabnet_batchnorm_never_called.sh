#!/usr/bin/env bash
# pytorch-tabnet 4.1.0 (torch 2.13.0): the network has two BatchNorm layers named initial_bn, and the outer one
# (tabnet.initial_bn) is never called: what normalizes the columns is tabnet.encoder.initial_bn. One process trains without
# a word, and its weight and bias are saved and shipped as they were made. DistributedDataParallel waits for their
# gradients and ends the second step with "Expected to have finished reduction in the prior iteration", which names no
# layer. Who copies or inspects "the input normalization" of a trained TabNet by the name tabnet.initial_bn gets zeros and
# ones. What is safe: find_unused_parameters=True, or requires_grad_(False) on that layer; and read encoder.initial_bn.
# seen: 2026-11-29: without a gradient: tabnet.initial_bn.weight, tabnet.initial_bn.bias
# seen: 2026-11-29: running_mean after 20 batches about 3 (momentum 0.01): outer 0.00, inner 0.54
# seen: 2026-11-29: DDP ends in the second step, and trains with find_unused_parameters=True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 pytorch-tabnet==4.1.0
FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os

import torch
import torch.distributed as dist
from pytorch_tabnet.tab_network import TabNet
from torch.nn.parallel import DistributedDataParallel


def network():
    torch.manual_seed(0)
    return TabNet(8, 5, group_attention_matrix=torch.eye(8)).train()


def steps(model, count):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        outputs, sparsity = model(torch.randn(64, 8) + 3)
        (outputs.square().mean() + 1e-3 * sparsity).backward()
        optimizer.step()


model = network()
steps(model, 20)
without = [name for name, item in model.named_parameters() if item.requires_grad and item.grad is None]
outer = float(model.tabnet.initial_bn.running_mean.mean())
inner = float(model.tabnet.encoder.initial_bn.running_mean.mean())
print(f"without a gradient: {', '.join(without)}; running_mean: outer {outer:.2f}, inner {inner:.2f}")
assert without == ["tabnet.initial_bn.weight", "tabnet.initial_bn.bias"], "all take part now"
assert outer == 0 and inner > 0.5, "the outer one is used now"

store = dist.FileStore(os.path.join(os.environ["FOLDER"], "store"), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
ended = ""
try:
    steps(DistributedDataParallel(network()), 2)
except RuntimeError as error:
    ended = str(error)
assert "Expected to have finished reduction in the prior iteration" in ended, ended or "DDP trains it now"
steps(DistributedDataParallel(network(), find_unused_parameters=True), 3)
print("DDP ends in the second step, and trains with find_unused_parameters=True")
dist.destroy_process_group()
PYTHON

"""What is written in the background is what was given, whatever training does to it meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.processes import PATIENCE

SAVED = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree as pytree
from torchworker.training.checkpoint import Checkpoints

folder = Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
checkpoints = Checkpoints(folder / "checkpoints", keep=1)
checkpoints.latest()
found = {}
for step, sharded in enumerate((False, True), 1):
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
    if sharded:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    whole = torch.randn(400, 300)

    def state():
        # Parts of one storage, one of them with gaps, and a number.
        own = {"first": whole[:10], "column": whole[:, 3], "again": whole[:10], "lr": 0.5, "parameter": model[0].bias}
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer), **own}

    def local(tensor):
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    before = [local(leaf).detach().clone() for leaf in pytree.tree_leaves(state()) if isinstance(leaf, torch.Tensor)]
    given = state()
    kept = {"best": {"weight": torch.ones(5)}}
    checkpoints.save(step, given, {"world": 1}, kept=kept)
    with torch.no_grad():
        for leaf in pytree.tree_leaves([given, kept]):
            if isinstance(leaf, torch.Tensor):
                local(leaf).fill_(-77)
    given["lr"] = 0.1
    checkpoints.wait()
    back = {**state(), "lr": 0.0, "best": {"weight": torch.zeros(5)}}
    # What is one storage in the state is filled by whoever comes last: apart here.
    back |= {"first": torch.zeros(10, 300), "column": torch.zeros(400), "again": torch.zeros(10, 300)}
    path, damaged = checkpoints.latest()
    checkpoints.load(path, back)
    best = back.pop("best")["weight"]
    after = [local(leaf) for leaf in pytree.tree_leaves(back) if isinstance(leaf, torch.Tensor)]
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    found[str(sharded)] = [len(same), all(same), back["lr"], float(best.sum()), damaged, checkpoints.failures]
dist.destroy_process_group()
print(json.dumps(found))
"""


def test_tensors_that_change_right_after_a_save_are_saved_as_they_were_plain_and_sharded(tmp_path: Path) -> None:
    (script := tmp_path / "saved.py").write_text(SAVED)
    ran = subprocess.run([sys.executable, "-P", script, tmp_path], capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    # 7 tensors of the model, 3 of Adam for each of 4 parameters, 4 of its own.
    assert found == {sharded: [23, True, 0.5, 5.0, [], []] for sharded in ("False", "True")}

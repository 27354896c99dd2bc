#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.HuggingFaceStorageWriter(path, save_distributed=True,
# enable_consolidation=True) lets every rank write its part and then makes whole safetensors files of the parts. Any state
# with an integer or boolean tensor, such as the num_batches_tracked of every batch norm, fails after all parts are written:
# _consolidate_hf_safetensors asks torch.finfo for the size of an element. A tensor of no dimensions, such as a learned
# scale, comes out as 0 whatever it was, without a word: _write_sub_tensor_to_file_optimized takes an empty shape for a tensor
# without elements. What is safe: one tensor after the other put together with DTensor.full_tensor(), and written.
# seen: 2026-11-30: integers: TypeError: torch.finfo() requires a floating point input type
# seen: 2026-11-30: a scalar of 3.5 was read back as 0.0; a matrix as it was
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0 numpy==2.3.5
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

folder = Path(sys.argv[1])


def written(state, name):
    writer = dcp.HuggingFaceStorageWriter(str(folder / name), save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=writer, no_dist=True)
    return load_file(folder / name / "model-00001-of-00001.safetensors")


state = {"matrix": torch.ones(2, 2), "scale": torch.tensor(3.5)}
found = written(state, "scalar")
print("a scalar of 3.5 was read back as", found["scale"].item())
assert found["scale"].item() == 0.0 and torch.equal(found["matrix"], state["matrix"]), "scalars are kept now"
try:
    written(nn.BatchNorm1d(3).state_dict(), "integers")
except BaseException as error:  # CheckpointException is no Exception
    said = str(error).strip().splitlines()[-1]
    print("integers:", said)
    assert "torch.finfo() requires a floating point input type" in said, said
else:
    raise AssertionError("integers are consolidated now")
PYTHON

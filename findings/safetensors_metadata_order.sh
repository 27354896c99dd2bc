#!/usr/bin/env bash
# safetensors 0.8.0: the texts that go into a file's header (`metadata=`, the format's `__metadata__`) are written in
# another order in each process, so two files with equal tensors and equal texts differ in their bytes and their hash.
# The order is that of a hash map with a random seed; sorting the dict before it is given, or setting PYTHONHASHSEED,
# changes nothing. With one text, or none, the bytes are always the same. Whoever names a model file by its hash (content
# addressed releases, caches, deduplicating stores, attestations) and keeps two texts in it has a new model at each save;
# `save_model` of a model with several tied weights keeps a text for each. One JSON text instead of several is stable.
# seen: 2026-11-29: one text: 1 hash in 12 processes
# seen: 2026-11-29: six texts, given in order, PYTHONHASHSEED=0: 12 hashes in 12 processes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
cat > "$folder/save.py" <<'PYTHON'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

texts = {f"key{number}": "value" for number in range(int(sys.argv[1]))}
print(hashlib.sha256(save({"weight": np.arange(4, dtype=np.float32)}, metadata=texts)).hexdigest())
PYTHON
export PYTHONHASHSEED=0
hashes() { for _ in $(seq 12); do "$folder/venv/bin/python" "$folder/save.py" "$1"; done | sort -u | wc -l; }
one=$(hashes 1)
six=$(hashes 6)
echo "one text: $one hash in 12 processes"
echo "six texts: $six hashes in 12 processes"
[ "$one" = 1 ] || { echo "expected one hash with one text"; exit 1; }
[ "$six" -gt 1 ] || { echo "expected several hashes with six texts: the order is stable now"; exit 1; }

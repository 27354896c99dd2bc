#!/usr/bin/env bash
# safetensors 0.8.0: save_file makes files of mode 0600, whatever the umask says and whatever mode the file had that it
# replaces. A file of weights beside others that a service reads under another user (a shared folder, a volume of an
# inference server) is one that it cannot open, and saving again over a file that was made readable takes that away. (It
# is written to a temporary file, with that mode, and renamed: a reader of the old one is not disturbed.) What is safe:
# chmod after each save.
# seen: 2026-11-29: umask 022: an ordinary file 0644, save_file 0600; made 0644 and saved again 0600
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
umask 022
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys

import numpy as np
from safetensors.numpy import save_file

plain, path = f"{sys.argv[1]}/plain", f"{sys.argv[1]}/weights.safetensors"
with open(plain, "w") as file:
    file.write("as any file is made")
save_file({"weight": np.ones(3, dtype=np.float32)}, path)
first = os.stat(path).st_mode & 0o777
os.chmod(path, 0o644)
save_file({"weight": np.ones(3, dtype=np.float32)}, path)
second = os.stat(path).st_mode & 0o777
print(f"umask 022: an ordinary file {os.stat(plain).st_mode & 0o777:04o}, save_file {first:04o}; made 0644 and saved again {second:04o}")
assert (first, second) == (0o600, 0o600), "the umask counts now"
PYTHON

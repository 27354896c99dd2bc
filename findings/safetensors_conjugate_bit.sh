#!/usr/bin/env bash
# safetensors 0.8.0, torch 2.13.0: save_file writes the memory of a tensor and forgets that torch may read it otherwise. A
# conjugate is lazy in torch: x.conj() is the memory of x and a bit, x.conj().imag a float tensor with a bit for "negative".
# Both are contiguous, pass every check of save_file, and are written without the bit: the file has x in place of its
# conjugate, and every value of the imaginary part with the other sign. Nothing is said, and .contiguous() before saving,
# which cures views otherwise, changes nothing. Outputs of spectral models, kept as reference values beside the weights,
# are of this kind (fft(x).conj().imag; torch.linalg's adjoints). What is safe: resolve_conj().resolve_neg() before
# saving; torch.save keeps the bits.
# seen: 2026-11-29: conjugate: saved -4.0000-9.6569j, loaded -4.0000+9.6569j
# seen: 2026-11-29: imaginary part of a conjugate: saved -2.0, loaded 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 safetensors==0.8.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file, save_file

path = f"{sys.argv[1]}/outputs.safetensors"
spectrum = torch.fft.rfft(torch.arange(8.0))
given = spectrum.conj().contiguous()
save_file({"conjugate": given}, path)
conjugate = load_file(path)["conjugate"]
assert torch.equal(conjugate, spectrum) and not torch.equal(conjugate, given), "the conjugate survives now"
one = torch.tensor([1 + 2j]).conj().imag
save_file({"imaginary": one}, path)
back = load_file(path)["imaginary"]
print(f"conjugate: saved {given[1]:.4f}, loaded {conjugate[1]:.4f}")
print(f"imaginary part of a conjugate: saved {float(one)}, loaded {float(back)}")
assert one.is_neg() and one.is_contiguous() and float(one) == -2 and float(back) == 2, "the sign survives now"
save_file({"imaginary": one.resolve_neg()}, path)
assert float(load_file(path)["imaginary"]) == -2
PYTHON

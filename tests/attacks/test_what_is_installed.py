"""A package index wants to give `ship serve` another file under the name of a pinned package."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.toolenv import environment
from train_and_ship.ship.server import requirements

PINNED = re.compile(r"[A-Za-z0-9_.-]+==[0-9][\w.]*( ;[^;]*)?( --hash=sha256:[0-9a-f]{64})+")


def test_every_line_of_the_serving_environment_has_a_version_and_hashes() -> None:
    lines = requirements()
    assert len(lines) > 15 and [line for line in lines if not PINNED.fullmatch(line)] == []
    assert len({line.partition("==")[0].lower() for line in lines}) == len(lines)


# That every line has one is asked above.
@pytest.mark.soak
def test_a_file_with_another_hash_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    files = {
        "small.py": "",
        "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
        "small-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for name, text in files.items()
    }
    record = "".join(f"{name},sha256={digests[name]},{len(text)}\n" for name, text in files.items())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, "small-1.0.dist-info/RECORD": f"{record}small-1.0.dist-info/RECORD,,\n"}.items():
            archive.writestr(name, text)
    pinned = f"small==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    python = environment("small", [pinned])
    assert subprocess.run([python, "-c", "import small"]).returncode == 0
    with pytest.raises(ServiceError, match=r"small: pip cannot install it here: .*DO NOT MATCH THE HASHES"):
        environment("small", [f"small==1.0 --hash=sha256:{'0' * 64}"])

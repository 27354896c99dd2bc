"""Build the C++ runner (`torchworker/cpp`) against the installed torch, once a machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from torchworker.contract import CppRequest, CppResult

SOURCES = Path(__file__).parents[1] / "cpp"
RUNNER = "ship_runner"
BUILD_SECONDS = 600


def build(request: CppRequest) -> CppResult:
    """The runner's path, from the cache when it was built before; else why there is none.

    A build is whole or absent: it is made in a folder of its own and renamed. The key is a hash of the sources and of
    the torch they are built against, so that another torch gets another runner.
    """
    key = hashlib.sha256(f"{torch.__version__} {Path(torch.__file__).parent}".encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    cache = Path(request.cache)
    kept = cache / key.hexdigest()[:16]
    if (kept / RUNNER).is_file():
        return CppResult(runner=str(kept / RUNNER))
    tool, compiler = cmake(), shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if tool is None or compiler is None:
        missing = " and ".join(name for name, found in (("cmake", tool), ("a C++ compiler", compiler)) if found is None)
        return CppResult(runner="", reason=f"no {missing} on this machine")
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        prefix = Path(torch.__file__).parent / "share" / "cmake"
        configure = [
            *(tool, "-S", str(SOURCES), "-B", folder, "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_COMPILER={compiler}"),
        ]
        for argv in (configure, [tool, "--build", folder]):
            try:
                done = subprocess.run(
                    argv,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=BUILD_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return CppResult(runner="", reason=f"building it took more than {BUILD_SECONDS} s")
            print(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}", flush=True)
            if done.returncode:
                return CppResult(runner="", reason=f"it does not build here: {_first_error(done.stdout + done.stderr)}")
        ready = Path(folder) / "ready"
        ready.mkdir()
        (Path(folder) / RUNNER).rename(ready / RUNNER)
        # Somebody else may have been faster; theirs is as good.
        if not (kept / RUNNER).is_file():
            shutil.rmtree(kept, ignore_errors=True)
            ready.rename(kept)
    return CppResult(runner=str(kept / RUNNER))


def cmake() -> str | None:
    """From the path, or from pip's `cmake` package, whose program lies beside this Python."""
    beside = Path(sysconfig.get_path("scripts")) / "cmake"
    return shutil.which("cmake") or (str(beside) if beside.is_file() else None)


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")[:300]

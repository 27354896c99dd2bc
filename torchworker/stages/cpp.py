"""Build the C++ runner (`torchworker/cpp/runner.cpp`) against the installed torch, once a machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from torchworker.contract import CppRequest, CppResult
from torchworker.durable import rename_durably

SOURCE = Path(__file__).parents[1] / "cpp" / "runner.cpp"
RUNNER = "ship_runner"
BUILD_SECONDS = 600


def build(request: CppRequest) -> CppResult:
    """The runner's path, from the cache when it was built before; else why there is none.

    A build is whole or absent: it is made in a folder of its own and renamed. The key is a hash of the source and of
    how it is compiled, which names the installed torch, so that another torch gets another runner.
    """
    key = hashlib.sha256(torch.__version__.encode() + SOURCE.read_bytes())
    key.update(" ".join(_arguments(Path(RUNNER))).encode())
    cache = Path(request.cache)
    kept = cache / key.hexdigest()[:16]
    if _is_there(kept):
        return CppResult(runner=str(kept / RUNNER))
    found = compiler()
    if found is None:
        return CppResult(runner="", reason="no C++ compiler on this machine")
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        ready = Path(folder) / "ready"
        ready.mkdir()
        argv = [found, *_arguments(ready / RUNNER)]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            return CppResult(runner="", reason=f"building it took more than {BUILD_SECONDS} s")
        print(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}", flush=True)
        if done.returncode:
            return CppResult(runner="", reason=f"it does not build here: {_first_error(done.stdout + done.stderr)}")
        # Somebody else may have been faster; theirs is as good.
        if not _is_there(kept):
            shutil.rmtree(kept, ignore_errors=True)
            rename_durably(ready, kept)
    return CppResult(runner=str(kept / RUNNER))


def _is_there(kept: Path) -> bool:
    """Not an empty file, as a power cut has left where nothing was synced."""
    return (kept / RUNNER).is_file() and (kept / RUNNER).stat().st_size > 0


def compiler() -> str | None:
    """The C++ compiler that `CXX` names, or c++, or g++."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _arguments(program: Path) -> list[str]:
    """What the compiler is given. torch's CMake package, of a CUDA build, would ask for the CUDA toolkit."""
    installed = Path(torch.__file__).parent
    include, libraries = installed / "include", installed / "lib"
    return [
        *("-std=c++20", "-O2", "-DNDEBUG", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        *("-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")),
        *(str(SOURCE), "-o", str(program), f"-L{libraries}", f"-Wl,-rpath,{libraries}"),
        # Operators register themselves when their library is loaded, so it is linked whether or not a symbol asks for
        # it. What libraries of a CUDA build need they find by their own RPATH, when they are loaded.
        *("-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", "-ltorch_cpu", "-lc10"),
        # RPATH, not RUNPATH, which does not count for what is loaded later: a compiled model asks for libtorch.so.
        "-Wl,--disable-new-dtags",
    ]


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")[:300]

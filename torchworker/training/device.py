"""Which device and backend a rank uses, and whether this machine has what the job asks for."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchworker.contract import TrainSettings
from torchworker.process.failure import UserError


def choose_device(settings: TrainSettings, ranks_here: int, local_rank: int = 0) -> torch.device:
    """The device of a rank; ranks_here: ranks on this machine, local_rank: which of them this is.

    `auto` is a GPU for each rank where there is one at all, else the CPU. Does not initialise CUDA.
    Raises UserError when there are fewer GPUs than ranks, or when device, backend, precision and switches do not fit
    each other.
    """
    gpus = torch.cuda.device_count()
    if settings.device == "cuda" and gpus == 0:
        built = "" if torch.version.cuda else f"; torch {torch.__version__} is built without CUDA"
        raise UserError(f"train.device: expected a CUDA device for each process, found none{built}; use device: cpu")
    on_gpu = settings.device != "cpu" and gpus > 0
    if on_gpu and ranks_here > gpus:
        raise UserError(
            f"train.processes: {ranks_here} processes on this machine need as many CUDA devices, found {gpus}; use "
            f"processes: {gpus}, or device: cpu"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    _check_fit(settings, device)
    return device


def backend_of(settings: TrainSettings, device: torch.device) -> str:
    """What init_process_group is given. With NCCL, small messages between CPUs still go over gloo."""
    if device.type == "cpu" or settings.backend == "gloo":
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def _check_fit(settings: TrainSettings, device: torch.device) -> None:
    if settings.backend == "nccl" and device.type == "cpu":
        raise UserError("train.backend: nccl exchanges between CUDA devices, and the device is cpu; use gloo")
    uses_nccl = device.type == "cuda" and settings.backend != "gloo"
    if settings.strategy == "fsdp" and device.type == "cuda" and not uses_nccl:
        raise UserError("train.backend: fsdp on CUDA devices needs nccl, got gloo")
    if settings.comm_hook == "bf16" and not uses_nccl:
        raise UserError("train.comm_hook: bf16 needs the backend nccl, and this is gloo; use fp16, or none")
    if settings.cudnn_benchmark and device.type == "cpu":
        raise UserError("train.cudnn_benchmark: is for CUDA devices, and the device is cpu")
    if settings.compile:
        _require_compiler()


def half_precision_is_native(dtype: torch.dtype) -> bool:
    """Whether this CPU has the instructions for float16 or bfloat16 that oneDNN, torch's library for it, wants.

    Without them (AVX-512 on x86) convolutions fall back to plain loops, twenty times as slow as float32 and more.
    """
    ask = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }[dtype]
    return bool(ask())


def device_notes(settings: TrainSettings, device: torch.device) -> list[str]:
    """What the job asks for and this machine is slow at."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
    if kind is None or device.type != "cpu" or half_precision_is_native(kind):
        return []
    return [
        f"train.precision: this CPU has no instructions for {settings.precision}, which makes convolutions many times "
        "slower than with float32"
    ]


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise UserError("train.compile: expected a C++ compiler (g++ or CXX), found none") from error


def enter_device(settings: TrainSettings, device: torch.device) -> None:
    """Make the device this process's own, with the settings that hold for the whole process."""
    torch.set_num_threads(settings.threads)
    # As torchrun sets it: a library of a custom loop's, such as accelerate, would choose a number of its own.
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark


def place(value: Any, device: torch.device, channels_last: bool) -> Any:
    """A batch on the device, tensor by tensor; images (four dimensions) in channels-last order when asked for."""
    if device.type == "cpu" and not channels_last:
        return value

    def move(tensor: Tensor) -> Tensor:
        if channels_last and tensor.dim() == 4:
            return tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(device, non_blocking=True)

    return pytree.tree_map_only(Tensor, move, value)


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU when it trains there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ranks_on_this_machine() -> tuple[int, int]:
    """(ranks here, which of them this is), as torch's launcher says."""
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])

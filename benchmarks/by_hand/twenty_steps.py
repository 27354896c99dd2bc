"""Twenty Adam steps of the reference net in one process, one way of running it: twenty_steps.py WAY THREADS.

Prints one JSON object: seconds of the first step, wall and CPU seconds of the median other step, the loss reached.
"""

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
from reference import build_dataset, build_model

STEPS, BATCH = 20, 128


def main(way: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused="fused" in way)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled="bf16" in way)
    run = model
    if "TorchScript" in way:
        warnings.simplefilter("ignore", DeprecationWarning)
        run = torch.jit.script(model)
    if "compile" in way:
        run = torch.compile(model)
    images, labels = build_dataset("train", STEPS * BATCH).tensors
    seconds, cpu = [], []
    for step in range(STEPS):
        began, used = time.perf_counter(), time.process_time()
        chosen = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        with autocast:
            loss = nn.functional.cross_entropy(run(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    said = {"first": seconds[0], "step": statistics.median(seconds[1:]), "cpu": statistics.median(cpu[1:])}
    print(json.dumps({**said, "loss": loss.item()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Train the reference net as a plain script does: torchrun --nproc-per-node=N reference_train.py OPTIONS_JSON."""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
from reference import build_dataset, build_model


def main(
    samples: int, epochs: int, batch: int, threads: int, fused: bool, precision: str, marks: str, net: str
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(marks, net))
    dataset = build_dataset("train", samples)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=batch // dist.get_world_size(), sampler=sampler)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    model.train()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            with autocast:
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}", flush=True)
    del model
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("start me with torchrun")
    main(**json.loads(sys.argv[1]))

"""Train a net on a GPU as a plain script does: torchrun --nproc-per-node=1 gpu_train.py OPTIONS_JSON.

Prints the seconds of each epoch as JSON.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))


def main(module: str, samples: int, epochs: int, batch: int, precision: str, read: bool) -> None:
    """read: look at the loss on every step, as for a progress bar; else once an epoch."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(0)
    net = importlib.import_module(module)
    model = DistributedDataParallel(net.build_model().to(device), device_ids=[device.index])
    dataset = net.build_dataset("train", samples)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=batch // dist.get_world_size(), sampler=sampler, pin_memory=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
    model.train()
    seconds = []
    for epoch in range(epochs):
        began = time.perf_counter()
        sampler.set_epoch(epoch)
        total = 0.0
        for inputs, labels in loader:
            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            with autocast:
                loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() if read else loss.detach()
        print(f"epoch {epoch + 1}: loss {float(total) / len(loader):.4f}", file=sys.stderr)
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))
    del model
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("start me with torchrun")
    main(**json.loads(sys.argv[1]))

"""Train the digits model on two processes, by hand: torchrun --standalone --nproc-per-node=2 train.py OUT_DIR."""

import gc
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/digits"))
from digits import build_dataset, build_model

# The same values as examples/digits/job.yaml; benchmarks/ship_vs_by_hand.py refuses to run when they differ.
TRAIN = {"processes": 2, "epochs": 12, "batch_size": 64, "seed": 0, "optimizer": "adam", "learning_rate": 0.003}
MODEL = {"width": 32}


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    model.eval()
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"validation_loss": cross_entropy(logits, labels).item(), "validation_accuracy": accuracy}


def fit(rank: int, world: int, out: Path) -> None:
    torch.manual_seed(TRAIN["seed"])
    model = DistributedDataParallel(build_model(**MODEL))
    torch.manual_seed(TRAIN["seed"] + rank)  # each rank drops out different units

    # One indexing call a batch instead of one a sample: a TensorDataset takes a list of indices.
    dataset = build_dataset("train")
    sampler = DistributedSampler(dataset, seed=TRAIN["seed"])
    batches = DataLoader(
        dataset, sampler=BatchSampler(sampler, TRAIN["batch_size"] // world, drop_last=False), batch_size=None
    )
    validation = build_dataset("validation").tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=TRAIN["learning_rate"])

    metrics = []
    for epoch in range(TRAIN["epochs"]):
        sampler.set_epoch(epoch)
        model.train()
        total = torch.zeros(2)  # sum of losses, samples
        for images, labels in batches:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += torch.stack([loss.detach() * len(labels), torch.tensor(float(len(labels)))])
        dist.all_reduce(total)
        train_loss = (total[0] / total[1]).item()
        if not math.isfinite(train_loss):
            raise SystemExit(f"epoch {epoch}: the training loss is {train_loss}")
        # Rank 0 alone: DDP keeps the batch norm statistics of rank 0, and 360 images are one batch.
        if rank == 0:
            metrics.append({"epoch": epoch, "train_loss": train_loss, **evaluate(model.module, *validation)})

    if rank == 0:
        save_file(model.module.state_dict(), out / "weights.safetensors")
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1))


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    if world != TRAIN["processes"]:
        raise SystemExit(f"expected {TRAIN['processes']} processes, torchrun started {world}")
    fit(dist.get_rank(), world, out)
    # A DDP module that is still alive keeps gloo's threads alive, and one of them may then abort the process
    # ("terminate called without an active exception") while Python shuts down.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("start me with: torchrun --standalone --nproc-per-node=2 train.py OUT_DIR")
    main(Path(sys.argv[1]))

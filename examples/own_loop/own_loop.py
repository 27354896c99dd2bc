"""A training loop of its own: handwritten digits with mixup and averaged weights, in plain PyTorch."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset


def build_model(width: int) -> nn.Module:
    """Images [batch, 1, 8, 8] float32 in 0..1 → logits [batch, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(8 * width, 10),
    )  # fmt: skip


def build_dataset(split: str) -> TensorDataset:
    """1,437 training or 360 held-out digits, divided once with a fixed seed."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[:1437] if split == "train" else order[1437:]
    return TensorDataset(images[chosen], torch.from_numpy(digits.target).long()[chosen])


def main(context, epochs: int, batch_size: int, learning_rate: float, mixup: float) -> nn.Module:
    """Called in every rank of a torchrun-like environment; the process group exists. Returns the trained model."""
    model = context.build_model().to(context.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    train_set = context.build_dataset("train")
    held_out = [tensor.to(context.device) for tensor in context.build_dataset("validation").tensors]
    steps_per_epoch = len(train_set) // batch_size
    steps = epochs * steps_per_epoch

    def batch(step: int) -> list[torch.Tensor]:
        """This rank's share of what a step trains on, for any step: a resumed run needs no other position."""
        epoch, number = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(context.seed + epoch))
        chosen = order[number * batch_size : (number + 1) * batch_size][context.rank :: context.world_size]
        return [tensor.to(context.device) for tensor in train_set[chosen]]

    # Each rank mixes and drops out differently. After this only the loop draws random numbers.
    torch.manual_seed(context.seed + context.rank)
    state = {"model": model, "average": average, "optimizer": optimizer}
    saved = context.checkpoint.load(state)

    for step in range(saved.step if saved else 0, steps):
        images, labels = batch(step)
        targets = one_hot(labels, 10).float()
        # Mixup (Zhang et al., 2018): train on weighted means of pairs of samples.
        share, partner = 1 - mixup * torch.rand(()).item(), torch.randperm(len(images))
        logits = ddp(share * images + (1 - share) * images[partner])
        loss = cross_entropy(logits, share * targets + (1 - share) * targets[partner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)

        done = step + 1
        if done % steps_per_epoch == 0:
            context.report({"train_loss": loss, **evaluate(average.module, *held_out)}, step=done, steps=steps)
        if context.checkpoint.is_due(done):
            context.checkpoint.save(state, step=done)
    return average.module


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    model.eval()
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return {"validation_loss": cross_entropy(logits, labels).item(), "validation_accuracy": accuracy.item()}

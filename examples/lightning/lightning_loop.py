"""PyTorch Lightning as the training loop: a small transformer reads handwritten digits row by row."""

import os
from pathlib import Path

import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

CHECKPOINT = "last.ckpt"
# In evaluation torch would use one fused operator for a whole layer, which ONNX does not have.
torch.backends.mha.set_fastpath_enabled(False)


class RowReader(nn.Module):
    """Images [batch, 8, 8] float32 in 0..1, a sequence of 8 rows → logits [batch, 10]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classify = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.encode(self.embed(image) + self.place).mean(1))


def build_model(width: int, layers: int) -> nn.Module:
    return RowReader(width, layers)


def build_dataset(split: str) -> TensorDataset:
    """1,437 training or 360 held-out digits, divided once with a fixed seed."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[:1437] if split == "train" else order[1437:]
    return TensorDataset(images[chosen], torch.from_numpy(digits.target).long()[chosen])


class Classifier(lightning.LightningModule):
    """How a model that gives logits is trained and measured."""

    def __init__(self, model: nn.Module, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.model, self.learning_rate, self.seed = model, learning_rate, seed

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        # Lightning's checkpoints hold no random state: draw each step's dropout from seed, step and rank.
        torch.manual_seed(self.seed + self.global_step * self.trainer.world_size + self.global_rank)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        logits = self.model(images)
        self.log("validation_loss", cross_entropy(logits, labels), sync_dist=True)
        self.log("validation_accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True)


class Bridge(lightning.Callback):
    """Tells the run what Lightning measured, and gives it Lightning's checkpoint, after every epoch."""

    def __init__(self, context) -> None:
        self.context = context
        self.folder = Path(context.folder) / "checkpoint"

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        step = trainer.global_step
        self.context.report(trainer.callback_metrics, step=step, steps=trainer.estimated_stepping_batches)
        # Every rank calls it and waits until rank 0 has written the file.
        trainer.save_checkpoint(self.folder / CHECKPOINT)
        self.context.checkpoint.save(step=step, files=self.folder)


def main(context, epochs: int, batch_size: int, learning_rate: float) -> nn.Module:
    """Called in every rank; Lightning finds torchrun's environment and the process group."""
    classifier = Classifier(context.build_model(), learning_rate, context.seed)
    each = batch_size // context.world_size
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if context.device.type == "cuda" else "cpu",
        strategy="ddp",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        callbacks=[Bridge(context)],
        # The run has its own checkpoints, curves and logs.
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        num_sanity_val_steps=0,
    )
    saved = context.checkpoint.load()
    trainer.fit(
        classifier,
        DataLoader(context.build_dataset("train"), each, shuffle=True),
        DataLoader(context.build_dataset("validation"), each),
        ckpt_path=saved.files / CHECKPOINT if saved else None,
    )
    return classifier.model

"""Architectures that nobody here wrote: tiny configurations, random weights, random samples. A job file names each.

Needs the packages of requirements.txt, which nothing else does. A new one is a row of `ARCHITECTURES`: how it is
built, what a sample is, how its outputs become a loss. `python -m tests.public NAME` asks one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset

CLASSES = 5
Sample = Callable[[Generator], Any]
"""Draws the inputs of one sample: a tensor, a tuple or a dict of tensors, without the batch."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One public model as a job has it."""

    name: str
    library: str
    """The package that holds it, as pip calls it."""
    build: Callable[[], nn.Module]
    sample: Sample
    target: Sample
    loss: str = "cross_entropy"
    """One of torch's by name, or a function of this module."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the job's `train`."""
    refused: str = ""
    """Words by which `ship check` rightly refuses it; `why` says why that is right."""
    notes: tuple[str, ...] = ()
    """What is rightly said of it besides."""
    why: str = ""
    max_batch: int | None = None
    """The job's `export.max_batch`."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Formats that it does not get, each with words by which the export is rightly refused."""


# ---- samples


def floats(*shape: int) -> Sample:
    return lambda generator: torch.randn(shape, generator=generator)


def image(size: int = 32, channels: int = 3) -> Sample:
    return floats(channels, size, size)


def tokens(length: int = 12, vocabulary: int = 60, **more: Sample) -> Sample:
    """Between a half and all of them are there; the rest is padding (0), as the mask says."""

    def draw(generator: Generator) -> dict[str, Tensor]:
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (), generator=generator)).long()
        return {
            "input_ids": ids * mask,
            "attention_mask": mask,
            **{name: made(generator) for name, made in more.items()},
        }

    return draw


def whole(below: int, *shape: int) -> Sample:
    return lambda generator: torch.randint(0, below, shape, generator=generator)


def padded(length: int) -> Sample:
    """Labels of tokens, -100 behind the last one."""

    def draw(generator: Generator) -> Tensor:
        labels = torch.randint(0, CLASSES, (length,), generator=generator)
        end = torch.randint(2, length + 1, (), generator=generator)
        return torch.where(torch.arange(length) < end, labels, -100)

    return draw


def together(*samples: Sample) -> Sample:
    return lambda generator: tuple(sample(generator) for sample in samples)


def by_name(**samples: Sample) -> Sample:
    return lambda generator: {name: sample(generator) for name, sample in samples.items()}


def adjacency(nodes: int) -> Sample:
    """Symmetric, no node without a neighbour."""

    def draw(generator: Generator) -> Tensor:
        edges = (torch.rand(nodes, nodes, generator=generator) < 0.4).float()
        ring = torch.eye(nodes).roll(1, 0)
        return ((edges + edges.T + ring + ring.T) > 0).float()

    return draw


LABEL = whole(CLASSES)
MEASURED = {"metrics": ["accuracy"]}
NO_MEAN = "of a batch is not the mean of those of its halves"
DECIDES = "forward decides what it calls"


# ---- losses, as their users write them


def of_logits(outputs: Any, target: Tensor) -> Tensor:
    """Cross entropy over classes: logits are the outputs' own, or the first of them."""
    return nn.functional.cross_entropy(_first(outputs), target)


def of_tokens(outputs: Any, target: Tensor) -> Tensor:
    """outputs: [batch, length, tokens]; target: [batch, length], -100 for padding."""
    return nn.functional.cross_entropy(_first(outputs).flatten(0, 1), target.flatten())


def of_values(outputs: Any, target: Tensor) -> Tensor:
    first = _first(outputs)
    return nn.functional.mse_loss(first.reshape(target.shape), target)


def of_pairs(outputs: Any, target: Tensor) -> Tensor:
    """CLIP's: each image belongs to the text at its place."""
    places = torch.arange(len(target))
    logits = outputs["logits_per_image"]
    return (nn.functional.cross_entropy(logits, places) + nn.functional.cross_entropy(logits.T, places)) / 2


def of_towers(outputs: Any, target: Tensor) -> Tensor:
    """The same, from the embeddings."""
    images, texts = outputs
    return of_pairs({"logits_per_image": images @ texts.T}, target)


def of_inception(outputs: Any, target: Tensor) -> Tensor:
    """With its auxiliary head, which is there in training only."""
    if isinstance(outputs, Tensor):
        return nn.functional.cross_entropy(outputs, target)
    return nn.functional.cross_entropy(outputs[0], target) + 0.4 * sum(
        nn.functional.cross_entropy(item, target) for item in outputs[1:] if item is not None
    )


def negative_mean(outputs: Tensor, target: Tensor) -> Tensor:
    """Of what gives the logarithm of a likelihood."""
    return -outputs.mean()


def _first(outputs: Any) -> Tensor:
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs[0]
    return outputs


# ---- builders


def library(name: str) -> Any:
    """A module, imported. torchvision's binaries need CUDA's torch: where they do not load, what it looks for first is
    declared, and none of these models calls it."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        declared = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(declared)
        return importlib.import_module(name)


_kept: list[Any] = []


def made(module: str, name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """What `module.name(*args, **options)` gives."""

    def build() -> nn.Module:
        if module != "torchvision":
            # Many look for it, and few need it.
            library("torchvision")
        found: Any = library(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found(*args, **options)

    return build


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return made("timm", "create_model", name, num_classes=CLASSES, **options)


def transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """From a configuration, without weights."""

    def build() -> nn.Module:
        library("torchvision")
        package = library("transformers")
        return getattr(package, model)(getattr(package, config)(**options))

    return build


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 32}


def clip() -> nn.Module:
    return transformers(
        "CLIPModel", "CLIPConfig", projection_dim=8, text_config={**TEXT, "eos_token_id": 2},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
    )()  # fmt: skip


class Towers(nn.Module):
    """CLIP as it is served: an embedding for each image and for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = clip()
        self.clip.logit_scale.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.clip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return found.image_embeds, found.text_embeds


class Graphs(nn.Module):
    """GATConv, SAGEConv and GINConv over a batch of graphs with as many nodes and edges each, as one large graph."""

    def __init__(self) -> None:
        super().__init__()
        layers = library("torch_geometric.nn")
        self.attention = layers.GATConv(4, 8, heads=2)
        self.sage = layers.SAGEConv(16, 16)
        self.gin = layers.GINConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)))
        self.pool = layers.global_mean_pool

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """x: [graphs, nodes, 4]; edges: [graphs, 2, edges], numbers of nodes of the same graph."""
        graphs, nodes, _ = x.shape
        first = torch.arange(graphs).view(-1, 1, 1) * nodes
        joined = (edges + first).transpose(0, 1).reshape(2, -1)
        hidden = torch.relu(self.attention(x.reshape(graphs * nodes, -1), joined))
        hidden = torch.relu(self.sage(hidden, joined))
        hidden = self.gin(hidden, joined)
        return self.pool(hidden, torch.arange(graphs).repeat_interleave(nodes), size=graphs)


class DenseGraphs(nn.Module):
    """DenseGCNConv over adjacency matrices, then a differentiable pooling."""

    def __init__(self) -> None:
        super().__init__()
        layers = library("torch_geometric.nn")
        self.first, self.assign = layers.DenseGCNConv(4, 16), layers.DenseSAGEConv(4, 3)
        self.second, self.pool = layers.DenseGCNConv(16, CLASSES), layers.dense_diff_pool

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x, adjacency))
        pooled, joined, _, _ = self.pool(hidden, adjacency, self.assign(x, adjacency))
        return self.second(pooled, joined).mean(1)


class TabNet(nn.Module):
    """The network of pytorch-tabnet, whose second output is a number for its loss."""

    def __init__(self) -> None:
        super().__init__()
        network = library("pytorch_tabnet.tab_network")
        groups = torch.eye(8)
        self.inner = network.TabNet(
            8, CLASSES, n_d=4, n_a=4, n_steps=2, virtual_batch_size=4, group_attention_matrix=groups
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Flow(nn.Module):
    """The log-likelihood of a masked autoregressive flow of nflows."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = library("nflows.flows").MaskedAutoregressiveFlow(4, 8, 2, 1, batch_norm_between_layers=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)


class Dynamics(nn.Module):
    """torchdiffeq: where an ordinary differential equation leads in one unit of time."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.net, self.method = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), method
        self.solve = library("torchdiffeq").odeint

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(lambda _, state: self.net(state), x, torch.tensor([0.0, 1.0]), method=self.method)[-1]


class Denoiser(nn.Module):
    """A model of diffusers by its output alone, with the step of each sample."""

    def __init__(self) -> None:
        super().__init__()
        library("torchvision")
        self.unet = library("diffusers").UNet2DModel(
            sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep).sample


def x_transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package = library("x_transformers")
        layers = getattr(package, kind)(dim=16, depth=2, heads=2, attn_dim_head=8, **options)
        return package.TransformerWrapper(num_tokens=60, max_seq_len=16, attn_layers=layers)

    return build


CHUNKS = "np.ceil(x.shape[0] / self.virtual_batch_size)"
"""Where TabNet cuts a batch into a number of parts that depends on its size."""


ARCHITECTURES = (
    Architecture(
        name="ResNet-10-T", library="timm", build=timm("resnet10t"), sample=image(), target=LABEL,
        train=MEASURED,
    ),
    Architecture(
        name="ViT", library="timm", sample=image(), target=LABEL, train=MEASURED,
        build=timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3),
    ),
    Architecture(
        name="ConvNeXt, stochastic depth", library="timm", sample=image(), target=LABEL,
        build=timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), drop_path_rate=0.2),
    ),
    Architecture(
        name="Swin", library="timm", sample=image(), target=LABEL,
        build=timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2)
        ),
    ),
    Architecture(
        name="MobileNetV3", library="timm", build=timm("mobilenetv3_small_050"), sample=image(), target=LABEL
    ),
    Architecture(name="ResNet-18", library="torchvision", sample=image(), target=LABEL,
        build=made("torchvision", "models.resnet18", num_classes=CLASSES),
    ),
    Architecture(
        name="GoogLeNet, auxiliary heads", library="torchvision", sample=image(64), target=LABEL, loss="of_inception",
        build=made("torchvision", "models.googlenet", num_classes=CLASSES, init_weights=False),
        lost={"onnx": "a finite answer hides the NaN"},
    ),
    Architecture(
        name="LR-ASPP", library="torchvision", sample=image(64), target=whole(CLASSES, 64, 64), loss="of_logits",
        train=MEASURED,
        build=made(
            "torchvision", "models.segmentation.lraspp_mobilenet_v3_large", num_classes=CLASSES,
            weights=None, weights_backbone=None,
        ),
    ),
    Architecture(
        name="BERT", library="transformers", sample=tokens(), target=LABEL, loss="of_logits",
        build=transformers("BertForSequenceClassification", "BertConfig", num_labels=CLASSES, **TEXT),
    ),
    Architecture(
        name="BERT, token classes", library="transformers", sample=tokens(), loss="of_tokens",
        target=padded(12),
        build=transformers("BertForTokenClassification", "BertConfig", num_labels=CLASSES, **TEXT),
    ),
    Architecture(
        name="DistilBERT", library="transformers", sample=tokens(), target=LABEL, loss="of_logits",
        build=transformers(
            "DistilBertForSequenceClassification", "DistilBertConfig", num_labels=CLASSES, vocab_size=60,
            max_position_embeddings=32, dim=16, n_layers=2, n_heads=2, hidden_dim=32,
        ),
    ),
    Architecture(
        name="GPT-2, classes", library="transformers", sample=tokens(), target=LABEL, loss="of_logits",
        build=transformers(
            "GPT2ForSequenceClassification", "GPT2Config", num_labels=CLASSES, vocab_size=60, n_positions=32,
            n_embd=16, n_layer=2, n_head=2, pad_token_id=0, use_cache=False,
        ),
    ),
    Architecture(
        name="Llama", library="transformers", sample=tokens(), target=whole(60, 12), loss="of_tokens",
        build=transformers("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, use_cache=False, **TEXT),
    ),
    Architecture(
        name="Mixtral", library="transformers", sample=tokens(), target=whole(60, 12), loss="of_tokens",
        lost={"torchscript": "sdpa_attention.py:121", "onnx": "transformers.grouped_mm_fallback"},
        build=transformers(
            "MixtralForCausalLM", "MixtralConfig", num_key_value_heads=1, num_local_experts=3, use_cache=False, **TEXT
        ),
    ),
    Architecture(
        name="T5 encoder", library="transformers", sample=tokens(), target=floats(12, 16), loss="of_values",
        build=transformers(
            "T5EncoderModel", "T5Config", vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        ),
    ),
    Architecture(
        name="Mamba", library="transformers", sample=by_name(input_ids=whole(60, 12)), target=whole(60, 12),
        loss="of_tokens",
        build=transformers(
            "MambaForCausalLM", "MambaConfig", vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4,
            use_cache=False,
        ),
    ),
    Architecture(
        name="wav2vec 2.0", library="transformers", sample=by_name(input_values=floats(800)), target=LABEL,
        loss="of_logits",
        build=transformers(
            "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", num_labels=CLASSES, conv_dim=(8, 8),
            conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2, classifier_proj_size=8, mask_time_prob=0.0, **SMALL,
        ),
        notes=(DECIDES,), why="LayerDrop: a layer is left out by chance",
        lost={"onnx": "shifted: logits"},
    ),
    Architecture(
        name="SegFormer", library="transformers", sample=by_name(pixel_values=image(64)),
        target=whole(CLASSES, 16, 16), loss="of_logits",
        build=transformers(
            "SegformerForSemanticSegmentation", "SegformerConfig", num_labels=CLASSES, num_encoder_blocks=4,
            depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        ),
    ),
    Architecture(
        name="CLIP", library="transformers", loss="of_pairs", target=LABEL, sample=tokens(pixel_values=image(32)),
        build=clip,
        refused="the answer to a sample depends on the other samples of its batch",
        why="its logits are of each image with each text of the batch; its towers are below",
    ),
    Architecture(
        name="CLIP, both towers", library="transformers", loss="of_towers", target=LABEL,
        sample=tokens(pixel_values=image(32)), build=Towers,
        notes=(NO_MEAN,),
        why="its loss holds each pair against all others of the batch",
    ),
    Architecture(
        name="graph nets, sparse", library="torch_geometric", build=Graphs, target=LABEL, train=MEASURED,
        lost={"torchscript": "gat_conv.py:393"},
        sample=together(floats(6, 4), whole(6, 2, 14)),
    ),
    Architecture(
        name="graph nets, dense", library="torch_geometric", build=DenseGraphs, target=LABEL,
        sample=together(floats(6, 4), adjacency(6)),
    ),
    Architecture(
        name="U-Net", library="segmentation-models-pytorch", sample=image(64), target=whole(CLASSES, 64, 64),
        build=made("segmentation_models_pytorch", "Unet", "resnet18", encoder_weights=None, classes=CLASSES),
    ),
    Architecture(
        name="DeepLabV3+", library="segmentation-models-pytorch", sample=image(64), target=whole(CLASSES, 64, 64),
        build=made("segmentation_models_pytorch", "DeepLabV3Plus", "resnet18", encoder_weights=None, classes=CLASSES),
    ),
    Architecture(
        name="U-Net of diffusion", max_batch=63, library="diffusers", build=Denoiser, target=image(16), loss="mse_loss",
        sample=together(image(16), whole(1000)),
        # A picture without contrast: some seven times as far from float64 as eager is, at its worst element.
        lost={"onnx": "zero: output"},
    ),
    Architecture(
        name="autoencoder", max_batch=63, library="diffusers", sample=image(16), target=image(16), loss="of_values",
        lost={"onnx": "output 'sample' of forward has the name of an input"},
        build=made(
            "diffusers", "AutoencoderKL", block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        refused="output 'sample' of forward has the name of an input",
        why="an ONNX file has each name once; without onnx it passes",
    ),
    Architecture(name="TabNet", library="pytorch-tabnet", build=TabNet, sample=floats(8), target=LABEL,
        lost={"torchscript": "a decision made on sizes", "pt2": CHUNKS, "onnx": CHUNKS},
        train={"find_unused_parameters": True},
        why="with find_unused_parameters: true, as it has a BatchNorm that it never calls (tabnet.initial_bn)",
    ),
    Architecture(
        name="encoder", library="x-transformers", sample=whole(60, 12), target=whole(60, 12), loss="of_tokens",
        build=x_transformers("Encoder", rotary_pos_emb=True),
    ),
    Architecture(
        name="decoder", library="x-transformers", sample=whole(60, 12), target=whole(60, 12), loss="of_tokens",
        build=x_transformers("Decoder", use_rmsnorm=True, attn_flash=True, layer_dropout=0.2),
        notes=(DECIDES,), why="layer_dropout leaves layers out by chance, by Python's generator",
    ),
    Architecture(
        name="masked autoregressive flow", library="nflows", build=Flow, sample=floats(4), target=floats(1),
        loss="negative_mean",
    ),
    Architecture(
        name="MobileViT", library="vit-pytorch", sample=image(64), target=LABEL,
        build=made(
            "vit_pytorch.mobile_vit", "MobileViT", image_size=(64, 64), dims=[16, 20, 24],
            channels=[8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 32], num_classes=CLASSES,
        ),
    ),
    Architecture(
        name="FT-Transformer", library="rtdl_revisiting_models", target=LABEL,
        lost={"torchscript": "rtdl_revisiting_models.py:446"},
        sample=by_name(x_cont=floats(3), x_cat=whole(4, 2)),
        build=made(
            "rtdl_revisiting_models", "FTTransformer", n_cont_features=3, cat_cardinalities=[4, 4], d_out=CLASSES,
            n_blocks=2, d_block=16, attention_n_heads=2, attention_dropout=0.1, ffn_d_hidden=None,
            ffn_d_hidden_multiplier=2.0, ffn_dropout=0.1, residual_dropout=0.0,
        ),
    ),
    Architecture(
        name="ODE, Runge-Kutta", library="torchdiffeq", build=lambda: Dynamics("rk4"), sample=floats(4),
        target=floats(4), loss="mse_loss",
    ),
    Architecture(
        name="ODE, adaptive steps", library="torchdiffeq", build=lambda: Dynamics("dopri5"), sample=floats(4),
        lost={"torchscript": "misc.py:60", "pt2": "data-dependent", "onnx": "data-dependent"},
        target=floats(4), loss="mse_loss",
        notes=(DECIDES,), why="the solver takes as many steps as values ask for",
    ),
    Architecture(
        name="U-Net with residual units", library="monai", sample=image(32, 1), target=whole(2, 32, 32),
        build=made(
            "monai.networks.nets", "UNet", spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8, 16),
            strides=(2, 2), num_res_units=1,
        ),
        # Instance norm of a picture without contrast, of which next to nothing is left but rounding.
        lost={"onnx": "zero: output"},
    ),
)  # fmt: skip
BY_NAME = {item.name: item for item in ARCHITECTURES}


# ---- what a job file names


def build_model(name: str) -> nn.Module:
    """Untrained."""
    return BY_NAME[name].build()


class Random(Dataset[Any]):
    """Samples that are drawn when they are asked for, each by its own seed."""

    def __init__(self, name: str, size: int, first: int) -> None:
        self.of, self.size, self.first = BY_NAME[name], size, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if index >= self.size:
            raise IndexError(index)
        generator = Generator().manual_seed(self.first + index)
        return self.of.sample(generator), self.of.target(generator)


def build_dataset(split: str, name: str) -> Random:
    """32 samples to train on, 16 to validate on."""
    return Random(name, 32, 0) if split == "train" else Random(name, 16, 1000)

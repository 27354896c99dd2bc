"""Small models of every kind that people export, and their data. Plain PyTorch, as a user would write it.

Shapes: B batch, T positions, D width, N nodes, E edges, V vocabulary, S sources, K beams.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

PAD, START, END = 0, 1, 2


class Dicts(Dataset):
    """Samples as dicts of inputs by name."""

    def __init__(self, target: Tensor, **inputs: Tensor) -> None:
        self.inputs, self.target = inputs, target

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {name: tensor[index] for name, tensor in self.inputs.items()}, self.target[index]


def generator(split: str) -> torch.Generator:
    return torch.Generator().manual_seed(0 if split == "train" else 1)


def features(split: str, *shape: int, count: int = 24) -> TensorDataset:
    """Random features [count, *shape] with a class in 0..2 each."""
    inputs = torch.randn(count, *shape, generator=generator(split))
    return TensorDataset(inputs, inputs.flatten(1).sum(1).gt(0).long())


def sentences(split: str, length: int = 7, vocabulary: int = 12) -> Tensor:
    """Token ids [24, length] of START, words, END, padding."""
    random = generator(split)
    tokens = torch.randint(3, vocabulary, (24, length), generator=random)
    tokens[:, 0] = START
    lengths = torch.randint(3, length + 1, (24,), generator=random)
    positions = torch.arange(length)
    tokens[positions >= lengths[:, None]] = PAD
    tokens[torch.arange(24), lengths - 1] = END
    return tokens


# --- images ---------------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """Convolutions, batch norm and dropout: image [B, 1, 8, 8] → logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5)
        )
        self.classify = nn.Linear(64, 3)
        nn.init.uniform_(self.features[1].weight, 0.5, 1.5)
        self.features[1].running_mean.uniform_(-0.5, 0.5)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.features(image).flatten(1))


def convolutional_data(split: str) -> TensorDataset:
    return features(split, 1, 8, 8)


class UNet(nn.Module):
    """Down, up and a skip connection, at any size: image [B, 1, H, W] → mask logits [B, 1, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        fine = F.relu(self.first(image))
        coarse = F.relu(self.second(F.max_pool2d(fine, 2, ceil_mode=True)))
        back = self.up(coarse)[:, :, : fine.shape[2], : fine.shape[3]]
        return self.last(torch.cat([fine, back], dim=1))


def unet_data(split: str) -> TensorDataset:
    images = torch.randn(24, 1, 9, 11, generator=generator(split))
    return TensorDataset(images, images.gt(0).float())


# --- sequences ------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM or GRU over tokens of any length: tokens [B, T] → logits [B, 3]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.cell = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](8, 8, batch_first=True)
        self.classify = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.cell(self.embed(tokens))
        return self.classify(states[:, -1])


def token_data(split: str) -> TensorDataset:
    tokens = sentences(split)
    return TensorDataset(tokens, tokens.sum(1) % 3)


class Seq2Seq(nn.Module):
    """GRU with attention. In eval mode it decodes greedily until every row has ended: source [B, T] → tokens [B, ≤T].

    stop: whether decoding ends early, or after fixed trips with a mask.
    """

    def __init__(self, stop: bool) -> None:
        super().__init__()
        self.stop = stop
        self.embed = nn.Embedding(12, 16)
        self.encoder, self.cell = nn.GRU(16, 16, batch_first=True), nn.GRUCell(16, 16)
        self.classify = nn.Linear(32, 12)

    def forward(self, source: Tensor) -> dict[str, Tensor]:
        memory, final = self.encoder(self.embed(source))
        state, token = final[0], torch.full_like(source[:, 0], 1)
        ended = torch.zeros_like(token, dtype=torch.bool)
        scores: list[Tensor] = []
        tokens: list[Tensor] = []
        for _ in range(6):
            state = self.cell(self.embed(token), state)
            weights = torch.softmax((memory @ state.unsqueeze(2)).masked_fill(source.eq(0).unsqueeze(2), -1e9), dim=1)
            logits = self.classify(torch.cat([state, (memory * weights).sum(1)], dim=1))
            token = logits.argmax(1).masked_fill(ended, 0)
            scores.append(logits.masked_fill(ended.unsqueeze(1), 0.0))
            tokens.append(token)
            ended = ended | token.eq(2) | token.eq(7)
            if self.stop and bool(ended.all()):
                break
        return {"scores": torch.stack(scores, 1), "tokens": torch.stack(tokens, 1)}


class BeamSearch(nn.Module):
    """Beam search of width 2 over a GRU cell: source [B, T] → tokens [B, ≤6] and score [B] of the best beam."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.classify = nn.Embedding(12, 16), nn.GRUCell(16, 16), nn.Linear(16, 12)

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        B, K, V = source.shape[0], 2, 12
        state = self.embed(source).mean(1).repeat_interleave(K, 0)
        token = torch.full_like(source[:, 0], 1).repeat_interleave(K, 0)
        score = torch.zeros(B, K, dtype=state.dtype)
        score[:, 1] = -1e4
        sequence = torch.zeros(B, K, 0, dtype=torch.long)
        for _ in range(6):
            state = self.cell(self.embed(token), state)
            step = F.log_softmax(self.classify(state), dim=1).view(B, K, V)
            ended = token.view(B, K, 1).eq(2)
            only_end = torch.arange(V).eq(2).to(step.dtype).sub(1).mul(1e4)
            score, best = (score.unsqueeze(2) + torch.where(ended, only_end, step)).view(B, -1).topk(K, dim=1)
            beam, token_BK = best // V, best % V
            rows = (torch.arange(B).unsqueeze(1) * K + beam).view(-1)
            state = state[rows]
            sequence = torch.cat([sequence.gather(1, beam.unsqueeze(2).expand_as(sequence)), token_BK.unsqueeze(2)], 2)
            token = token_BK.reshape(-1)
            if bool(token.eq(2).all()):
                break
        return sequence[:, 0], score[:, 0]


class Encoder(nn.Module):
    """Transformer encoder with a padding mask that may be left out: tokens [B, T], padding [B, T] → nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(12, 8), nn.Embedding(16, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.classify = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, padding: Tensor | None = None):
        states = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        if segments is not None:
            states = states + segments.unsqueeze(2)
        states = self.layer(states, src_key_padding_mask=padding)
        kept = torch.ones_like(tokens, dtype=torch.bool) if padding is None else ~padding
        pooled = (states * kept.unsqueeze(2)).sum(1) / kept.sum(1, keepdim=True)
        return {"logits": self.classify(pooled), "hidden": (states, pooled), "lengths": kept.sum(1)}


def encoder_data(split: str) -> Dataset:
    tokens = sentences(split)
    return Dicts(tokens.sum(1) % 3, tokens=tokens, padding=tokens.eq(PAD))


class CachedDecoder(nn.Module):
    """One step of a decoder with a key-value cache: token [B], keys, values [B, T, D] → logits and longer caches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project, self.classify = nn.Embedding(12, 8), nn.Linear(8, 24), nn.Linear(8, 12)

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = self.project(self.embed(token)).unsqueeze(1).chunk(3, dim=2)
        keys, values = torch.cat([keys, key], 1), torch.cat([values, value], 1)
        context = F.scaled_dot_product_attention(query, keys, values)
        return self.classify(context.squeeze(1)), (keys, values)


def cached_data(split: str) -> Dataset:
    random = generator(split)
    keys, values = torch.randn(2, 24, 5, 8, generator=random)
    token = torch.randint(0, 12, (24,), generator=random)
    return Dicts(token % 3, token=token, keys=keys, values=values)


# --- tables and graphs ----------------------------------------------------------------------------------------


class Recommender(nn.Module):
    """Embedding bags and a dense part (DLRM): dense [B, 4], history [B, T] of items → score [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, 8, mode=mode) for mode in ("sum", "mean"))
        self.bottom, self.top = nn.Linear(4, 8), nn.Linear(11, 1)

    def forward(self, dense, history):
        vectors = [self.bottom(dense), *(table(history) for table in self.tables)]
        stacked = torch.stack(vectors, 1)
        pairs = stacked @ stacked.transpose(1, 2)
        upper = torch.cat([pairs[:, 0, 1:2], pairs[:, 0, 2:], pairs[:, 1, 2:]], 1)
        return self.top(torch.cat([vectors[0], upper], 1))


def recommender_data(split: str) -> Dataset:
    random = generator(split)
    dense, history = torch.randn(24, 4, generator=random), torch.randint(0, 20, (24, 5), generator=random)
    return Dicts(dense.sum(1, keepdim=True).gt(0).float(), dense=dense, history=history)


class Graph(nn.Module):
    """Messages along edges, added up with scatter: nodes [B, N, 4], edges [B, E, 2] → nodes [B, N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(4, 8), nn.Linear(12, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, sink = edges[:, :, 0], edges[:, :, 1]
        sent = torch.relu(self.message(nodes)).gather(1, source.unsqueeze(2).expand(-1, -1, 8))
        inbox = torch.zeros(nodes.shape[0], nodes.shape[1], 8, dtype=sent.dtype)
        inbox = inbox.scatter_add(1, sink.unsqueeze(2).expand(-1, -1, 8), sent)
        return self.update(torch.cat([nodes, inbox], 2))


def graph_data(split: str) -> Dataset:
    random = generator(split)
    nodes, edges = torch.randn(24, 5, 4, generator=random), torch.randint(0, 5, (24, 9, 2), generator=random)
    return Dicts(nodes.sum(2, keepdim=True).expand(-1, -1, 3).clone(), nodes=nodes, edges=edges)


# --- control flow ---------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A Python `if` on data: features [B, 4] → logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.warm, self.cold = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, features: Tensor) -> Tensor:
        if features.sum() > 0:
            return self.warm(features)
        return self.cold(features)


class Cond(Branch):
    """The same with torch.cond."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cond(features.sum() > 0, self.warm, self.cold, (features,))


class Untyped(nn.Module):
    """A straight encoder that cannot be scripted, in a loop that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.step = Squeeze(), nn.Linear(4, 4)

    def forward(self, features: Tensor) -> Tensor:
        state = self.encode(features)
        rounds = 0
        while bool(state.abs().max() > 0.05) and rounds < 20:
            state = torch.tanh(self.step(state)) * 0.5
            rounds += 1
        return state[:, :3]


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = {"first": 1.5, "second": -0.5}
        self.mix = nn.Linear(4, 4)

    def forward(self, features):
        return sum(scale * self.mix(features) for name, scale in sorted(self.layers.items(), key=lambda pair: pair[0]))


def branch_data(split: str) -> TensorDataset:
    return features(split, 4)

"""Small models of several kinds, and what can go wrong with them between training and an artifact.

A defect is a function from a copy of the model to what the artifact computes instead: a model to export, or a call.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Call = Callable[[Mapping[str, Tensor]], list[Tensor]]


# --- models: trained just enough that weights, statistics and outputs have sizes of their own ------------------


class Convolutional(nn.Module):
    """image [B, 1, 12, 12] → logits [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.square, self.drop, self.classify = nn.Linear(64, 64), nn.Dropout(0.3), nn.Linear(64, 5)
        self.act = nn.ReLU()
        self.limit = 30.0

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(self.act(self.norm1(self.first(image))), 2, ceil_mode=True)
        x = F.adaptive_avg_pool2d(self.act(self.norm2(self.second(x))), 2).flatten(1)
        return self.classify(self.drop(self.act(self.square(x)))).clamp(-self.limit, self.limit)


class Dense(nn.Module):
    """features [B, 12] → logits [B, 4], probability [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.square = nn.Linear(12, 32), nn.LayerNorm(32), nn.Linear(32, 32)
        self.act, self.drop, self.last = nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(self.act(self.norm(self.first(features))))
        logits = self.last(x + self.act(self.square(x)))
        return logits, logits.softmax(1)


class Recurrent(nn.Module):
    """tokens [B, T], lengths [B] → logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(20, 12, padding_idx=0), nn.LSTM(12, 16, batch_first=True)
        self.classify = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.cell(self.embed(tokens))
        last = states.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, 16)).squeeze(1)
        return self.classify(last)


class Encoder(nn.Module):
    """tokens [B, T], kept [B, T] bool → logits [B, 4], label [B] int64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(20, 16), nn.Embedding(16, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.act = nn.Linear(16, 32), nn.Linear(32, 16), nn.GELU()
        self.classify = nn.Linear(16, 4)
        self.scale, self.shift = 1 / math.sqrt(8), 0

    def forward(self, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        B, T = tokens.shape
        x = self.embed(tokens) + self.position(torch.arange(T) + self.shift)
        q, k, v = self.mix(self.norm1(x)).view(B, T, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~kept.view(B, 1, 1, T), -1e9)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, 16))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        weight = kept.to(x.dtype).unsqueeze(2)
        logits = self.classify((x * weight).sum(1) / weight.sum(1))
        return logits, logits.argmax(1)


class Recommender(nn.Module):
    """dense [B, 6], history [B, T] of items → score [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.table = nn.EmbeddingBag(50, 8, mode="mean"), nn.Embedding(50, 8)
        self.bottom, self.square, self.top = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(11, 1)
        self.act = nn.SiLU()

    def forward(self, dense: Tensor, history: Tensor) -> Tensor:
        parts = torch.stack([self.act(self.bottom(dense)), self.bag(history), self.table(history[:, 0])], 1)
        pairs = parts @ self.square(parts).transpose(1, 2)
        return self.top(torch.cat([parts[:, 0], pairs[:, 0, 1:], pairs[:, 1, 2:]], 1))


class UNet(nn.Module):
    """image [B, 2, 11, 11] → map [B, 1, 11, 11]."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(2, 8, 3, padding=1, padding_mode="reflect")
        self.down2 = nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.act = nn.GroupNorm(4, 16), nn.LeakyReLU(0.1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 1, 1)
        self.mode, self.align = "bilinear", False

    def forward(self, image: Tensor) -> Tensor:
        fine = self.act(self.down1(image))
        coarse = self.act(self.norm(self.down2(F.avg_pool2d(fine, 2, ceil_mode=True, count_include_pad=False))))
        back = F.interpolate(self.up(coarse), size=(11, 11), mode=self.mode, align_corners=self.align)
        return torch.sigmoid(self.last(torch.cat([fine, back], 1)))


class Greedy(nn.Module):
    """source [B, T] → tokens [B, 5] int64, scores [B, 5, 12]: decoding with a cell, a branch on data inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.classify = nn.Embedding(12, 16), nn.GRUCell(16, 16), nn.Linear(16, 12)
        self.steps, self.end = 5, 2

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        state = self.embed(source).mean(1)
        token, ended = torch.full_like(source[:, 0], 1), torch.zeros_like(source[:, 0], dtype=torch.bool)
        tokens, scores = [], []
        for _ in range(self.steps):
            state = self.cell(self.embed(token), state)
            logits = self.classify(state)
            token = torch.where(ended, 0, logits.argmax(1))
            ended = ended | (token == self.end)
            tokens.append(token)
            scores.append(logits)
        return torch.stack(tokens, 1), torch.stack(scores, 1)


class Gated(nn.Module):
    """features [B, 8] → value [B]: a Python decision on the data, which some samples take and some do not."""

    def __init__(self) -> None:
        super().__init__()
        self.warm, self.cold, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.tensor(1.3))

    def forward(self, features: Tensor) -> Tensor:
        if bool(features.mean() > 0):
            return self.end(self.warm(features))
        return self.end(self.cold(features))

    def end(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.log1p(x.square().sum(1)) * self.scale


@dataclass(frozen=True)
class Case:
    """A model, real-looking data and the names of its inputs and outputs."""

    name: str
    model: nn.Module
    data: dict[str, Tensor]
    outputs: list[str]
    kinds: tuple[str, ...] = ("torchscript", "onnx", "pt2")
    """Formats that can hold it; with none it is called."""


SINGLE, PAIR = ["output"], ["output_0", "output_1"]


def cases() -> list[Case]:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    n = 96
    lengths = torch.randint(2, 8, (n,), generator=g)
    tokens = torch.randint(1, 20, (n, 7), generator=g)
    tokens[torch.arange(7) >= lengths[:, None]] = 0
    found = [
        Case("cnn", Convolutional(), {"image": torch.rand(n, 1, 12, 12, generator=g)}, SINGLE),
        Case("mlp", Dense(), {"features": torch.randn(n, 12, generator=g) * 2 + 1}, PAIR),
        Case("lstm", Recurrent(), {"tokens": tokens, "lengths": lengths}, SINGLE, ("torchscript",)),
        Case("encoder", Encoder(), {"tokens": tokens, "kept": tokens != 0}, PAIR),
        Case(
            "recommender",
            Recommender(),
            {"dense": torch.randn(n, 6, generator=g), "history": torch.randint(0, 50, (n, 5), generator=g)},
            SINGLE,
        ),
        Case("unet", UNet(), {"image": torch.randn(n, 2, 11, 11, generator=g)}, SINGLE),
        Case("greedy", Greedy(), {"source": torch.randint(3, 12, (n, 6), generator=g)}, PAIR),
        Case("gated", Gated(), {"features": torch.randn(n, 8, generator=g)}, SINGLE, kinds=()),
    ]
    for case in found:
        _train_a_little(case)
    return found


def _train_a_little(case: Case) -> None:
    """Thirty steps towards random targets: weights and statistics leave their initial values."""
    model, optimizer = case.model.train(), torch.optim.Adam(case.model.parameters(), lr=0.01)
    for step in range(30):
        rows = torch.arange(16) + 16 * (step % 6)
        out = model(*(tensor[rows] for tensor in case.data.values()))
        floats = [item for item in (out if isinstance(out, tuple) else (out,)) if item.is_floating_point()]
        loss = sum((item - torch.sin(torch.arange(item.numel()).view(item.shape))).square().mean() for item in floats)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)


# --- defects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    """kind: what goes wrong, shared by models; make: the wrong model, or a call of it for what only a runtime does."""

    case: str
    kind: str
    make: Callable[[nn.Module], nn.Module | Call]


def defects(case: Case) -> Iterator[Defect]:
    for kind, make in [*weights(case), *parts(case), *structure(case.name), *runtime(case)]:
        yield Defect(case.name, kind, make)


def edit(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    """A defect that changes a copy in place."""

    def make(model: nn.Module) -> nn.Module:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            change(copied)
        return copied.eval()

    return make


def largest(model: nn.Module) -> Tensor:
    return max(model.parameters(), key=lambda tensor: tensor.numel())


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def one(model: nn.Module, relative: float) -> None:
    """Change the largest weight of the largest tensor by a relative amount."""
    flat = largest(model).view(-1)
    flat[flat.abs().argmax()] *= 1 + relative


def cast(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for tensor in model.parameters():
            tensor.copy_(tensor.to(dtype))

    return change


def quantised(model: nn.Module) -> None:
    tensor = largest(model)
    step = tensor.abs().max() / 127
    tensor.copy_((tensor / step).round() * step)


def weights(case: Case) -> Iterator[tuple[str, Callable]]:
    yield "weights in bfloat16", edit(cast(torch.bfloat16))
    yield "weights in float16", edit(cast(torch.float16))
    yield "one weight off by 1e-3", edit(lambda model: one(model, 1e-3))
    yield "one weight off by 1e-5", edit(lambda model: one(model, 1e-5))
    yield "one tensor in int8", edit(quantised)
    if linears(case.model):
        yield "bias missing", edit(lambda model: linears(model)[-1].bias.zero_())
        yield "bias of one output off by 1e-4", edit(lambda model: linears(model)[-1].bias[0].add_(1e-4))
    if hasattr(case.model, "square"):
        yield "square layer transposed", edit(lambda model: model.square.weight.copy_(model.square.weight.T.clone()))
    if hasattr(case.model, "embed"):
        yield "one embedding row of another checkpoint", edit(lambda model: model.embed.weight[7].mul_(1.01))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)]


def parts(case: Case) -> Iterator[tuple[str, Callable]]:
    if norms(case.model):
        yield "eps 1e-5 → 1e-3", edit(lambda model: [setattr(norm, "eps", 1e-3) for norm in norms(model)])
        yield "eps 1e-5 → 1e-6", edit(lambda model: [setattr(norm, "eps", 1e-6) for norm in norms(model)])
        yield "norm without its affine part", edit(lambda model: norms(model)[0].weight.fill_(1))
    if case.name == "cnn":
        yield "momentum swapped: statistics moved once more", edit(moved_statistics)
        yield "batch norm left in train mode", with_mode("norm1")
    if hasattr(case.model, "drop"):
        # Called: the ONNX exporter mends it.
        yield "dropout left on", lambda model: eager(with_mode("drop")(model))
    act = getattr(case.model, "act", None)
    swaps = {
        nn.GELU: [("gelu by tanh", nn.GELU("tanh")), ("gelu by x·sigmoid(1.702x)", Quick())],
        nn.ReLU: [("relu6 for relu", nn.ReLU6()), ("relu → leaky 1e-3", nn.LeakyReLU(1e-3))],
        nn.SiLU: [("silu → hardswish", nn.Hardswish())],
        nn.LeakyReLU: [("slope 0.1 → 0.01", nn.LeakyReLU(0.01))],
    }
    for kind, other in swaps.get(type(act), []):
        yield kind, edit(lambda model, other=other: setattr(model, "act", other))
    if type(act) is nn.GELU:
        yield "erf by a polynomial (1.5e-7)", edit(lambda model: setattr(model, "act", Polynomial()))
    if linears(case.model):
        yield "one layer in tf32", edit(lambda model: replace_linear(model, 10))
        yield "one layer in bfloat16", edit(lambda model: replace_linear(model, 7))


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Polynomial(nn.Module):
    """gelu with Abramowitz and Stegun 7.1.26 for erf."""

    def forward(self, x: Tensor) -> Tensor:
        y = x / math.sqrt(2)
        t = 1 / (1 + 0.3275911 * y.abs())
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        return 0.5 * x * (1 + torch.sign(y) * (1 - series * torch.exp(-y * y)))


class Rounded(nn.Module):
    """A linear layer whose factors keep `bits` bits of mantissa."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.linear, self.factor = linear, float(2 ** (23 - bits) + 1)

    def cut(self, x: Tensor) -> Tensor:
        wide = x * self.factor
        return wide - (wide - x)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.cut(x), self.cut(self.linear.weight), self.linear.bias)


def replace_linear(model: nn.Module, bits: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Rounded(module, bits))
            return


def moved_statistics(model: nn.Module) -> None:
    norm = model.norm1
    norm.running_mean.mul_(0.999).add_(0.001 * norm.running_mean.roll(1))
    norm.running_var.mul_(0.999).add_(0.001 * norm.running_var.roll(1))


def with_mode(part: str) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        copied = copy.deepcopy(model).eval()
        copied.get_submodule(part).train()
        return copied

    return make


def structure(name: str) -> Iterator[tuple[str, Callable]]:
    """Defects of one architecture."""
    if name == "cnn":
        yield "padding lost", edit(lambda model: setattr(model.first, "padding", (0, 0)))
        yield "padding mode zeros → replicate", edit(lambda model: pad(model.first, "replicate"))
        yield "clamp removed", edit(lambda model: setattr(model, "limit", math.inf))
        yield "kernel flipped", edit(lambda model: model.first.weight.copy_(model.first.weight.flip(-1)))
    if name == "unet":
        yield "padding mode reflect → zeros", edit(lambda model: pad(model.down1, "zeros"))
        yield "align_corners", edit(lambda model: setattr(model, "align", True))
        yield "groups swapped", edit(lambda model: setattr(model.norm, "num_groups", 8))
        yield "transposed kernel flipped", edit(lambda model: model.up.weight.copy_(model.up.weight.flip(-1, -2)))
    if name == "lstm":
        yield "gates in another order", edit(swap_gates)
        yield "bias of the cell counted twice", edit(lambda model: model.cell.bias_ih_l0.mul_(2))
        yield "lengths ignored: the last position", lambda model: ignoring(model, "lengths", lambda t: t * 0 + 7)
    if name == "encoder":
        yield "mask ignored", lambda model: ignoring(model, "kept", torch.ones_like)
        yield "position off by one", edit(lambda model: setattr(model, "shift", 1))
        yield "attention not scaled", edit(lambda model: setattr(model, "scale", 1.0))
        yield "attention scale 1e-4 off", edit(lambda model: setattr(model, "scale", model.scale * 1.0001))
        yield "label in int32", lambda model: changed(model, lambda out: [out[0], out[1].int()])
    if name == "recommender":
        yield "bag sums instead of means", edit(lambda model: setattr(model.bag, "mode", "sum"))
        yield "first and second item swapped", lambda model: ignoring(model, "history", lambda t: t.flip(1))
    if name == "greedy":
        yield "one step less, padded", lambda model: changed(model, shortened)
        yield "another end token", edit(lambda model: setattr(model, "end", 3))
        yield "ties decided the other way", lambda model: changed(model, lambda out: [out[0].flip(1), out[1]])
    if name == "gated":
        yield "branch baked in: warm", lambda model: baked(model, "warm")
        yield "branch baked in: cold", lambda model: baked(model, "cold")
        yield "log1p as log(1+x) in float16", lambda model: changed(model, lambda out: [out[0].half().float()])
    if name == "mlp":
        yield "softmax over the batch", lambda model: changed(model, lambda out: [out[0], out[0].softmax(0)])
        yield "outputs swapped", lambda model: changed(model, lambda out: out[::-1])
        yield "residual lost", edit(lambda model: (model.square.weight.zero_(), model.square.bias.zero_()))


def pad(conv: nn.Conv2d, mode: str) -> None:
    conv.padding_mode = mode


def swap_gates(model: nn.Module) -> None:
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        tensor = getattr(model.cell, name)
        i, f, g, o = tensor.clone().chunk(4)
        tensor.copy_(torch.cat([i, o, f, g]))


def shortened(out: list[Tensor]) -> list[Tensor]:
    tokens = out[0].clone()
    tokens[:, -1] = 0
    return [tokens, out[1]]


def listed(out: object) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def eager(model: nn.Module) -> Call:
    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return listed(model(*inputs.values()))

    return call


def changed(model: nn.Module, change: Callable[[list[Tensor]], list[Tensor]]) -> Call:
    return lambda inputs: change(eager(model)(inputs))


def ignoring(model: nn.Module, name: str, instead: Callable[[Tensor], Tensor]) -> Call:
    return lambda inputs: eager(model)({**inputs, name: instead(inputs[name])})


def baked(model: nn.Module, way: str) -> Call:
    return lambda inputs: [model.end(getattr(model, way)(inputs["features"]))]


def runtime(case: Case) -> Iterator[tuple[str, Callable]]:
    """What only shows in how the artifact is called. Each on the architectures where it can happen."""
    name, first = case.name, next(iter(case.data))
    real = case.data[first].is_floating_point()
    if name in ("cnn", "encoder", "recommender"):
        yield "batches above the captured one cut", lambda model: changed(model, lambda out: [o[:16] for o in out])
    if name in ("cnn", "mlp", "lstm"):
        yield "state kept between calls", Counting
    if name in ("mlp", "unet"):
        yield "input edited in place", lambda model: scribbling(model, first)
        yield "strides ignored", lambda model: flat(model, first)
    if name in ("mlp", "cnn"):
        yield "NaN becomes 0", lambda model: ignoring(model, first, lambda t: t.nan_to_num(0.0))
        yield "NaN reaches other samples", lambda model: spreading(model, first)
    if name in ("mlp", "unet", "gated"):
        yield "input clipped to what calibration saw", lambda model: clipped(model, first, case.data[first])
    if name in ("lstm", "encoder", "recommender", "greedy"):
        ids = "history" if name == "recommender" else first
        yield "index too large is clipped", lambda model: ignoring(model, ids, lambda t: t.clamp(max=11))
        yield "index −1 is the last row", lambda model: wrapping(model, ids)
    if name in ("cnn", "greedy"):
        yield "batch 1 squeezed", lambda model: changed(model, lambda out: [o.squeeze(0) for o in out])
    if name in ("cnn", "unet"):
        yield "output in float64", lambda model: changed(model, lambda out: [o.double() for o in out])
        yield "output through float16", lambda model: changed(model, lambda out: [o.half().float() for o in out])
    if name in ("recommender", "gated"):
        yield (
            "noise of 1e-6",
            lambda model: changed(model, lambda out: [o * (1 + 1e-6 * torch.randn_like(o)) for o in out]),
        )
    if name == "lstm":
        yield "hidden state of the last call", Stale
    if name == "cnn":
        yield "statistics over the batch", lambda model: changed(model, lambda out: [out[0] - 1e-4 * out[0].mean(0)])
    if name == "mlp" and real:
        yield "computed in bfloat16", lambda model: lowered(model, first)


def noisy(out: list[Tensor]) -> list[Tensor]:
    return [tensor * (1 + 1e-6 * torch.randn_like(tensor)) for tensor in out]


class Counting:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        self.calls += 1
        return [out * (1 + 1e-7 * self.calls) for out in eager(self.model)(inputs)]


class Stale:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.state = model, None

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            embedded = self.model.embed(inputs["tokens"])
            start = self.state if self.state is not None and self.state[0].shape[1] == len(embedded) else None
            states, self.state = self.model.cell(embedded, start)
            places = (inputs["lengths"] - 1).view(-1, 1, 1).expand(-1, 1, 16)
            return [self.model.classify(states.gather(1, places).squeeze(1))]


def scribbling(model: nn.Module, name: str) -> Call:
    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        out = eager(model)(inputs)
        inputs[name].mul_(0.5)
        return out

    return call


def flat(model: nn.Module, name: str) -> Call:
    def read(tensor: Tensor) -> Tensor:
        strides = torch.empty(tensor.shape).stride()
        return tensor.as_strided(tensor.shape, strides) if tensor.numel() else tensor

    return ignoring(model, name, read)


def spreading(model: nn.Module, name: str) -> Call:
    return lambda inputs: [out + 0 * inputs[name].sum() for out in eager(model)(inputs)]


def clipped(model: nn.Module, name: str, data: Tensor) -> Call:
    low, high = float(data.min()), float(data.max())
    return ignoring(model, name, lambda tensor: tensor.clamp(low, high))


def wrapping(model: nn.Module, name: str) -> Call:
    table = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    return ignoring(model, name, lambda tensor: torch.where(tensor < 0, tensor + table.num_embeddings, tensor))


def lowered(model: nn.Module, name: str) -> Call:
    low = copy.deepcopy(model).bfloat16()
    return lambda inputs: [out.float() for out in eager(low)({name: inputs[name].bfloat16()})]

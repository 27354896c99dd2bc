"""The zoo: each model with its data, its declared dimensions, and what it is there for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKENS = {"length": {"axes": {"tokens": 1}, "max": 16}}
SOURCE = {"length": {"axes": {"source": 1}, "max": 16}}


@dataclass(frozen=True, kw_only=True)
class Animal:
    """One model."""

    name: str
    model: str
    """`module:attribute` of the folder models."""
    data: str
    args: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Any] = field(default_factory=dict)
    """As in the job file."""
    libraries: tuple[str, ...] = ()
    compiled: bool = False
    """Whether AOTInductor is asked too: a compilation takes many seconds, so only a few models are."""
    coupled: bool = False
    """Whether answers depend on the other samples of a batch."""


ZOO = (
    Animal(
        name="convolutions, batch norm, dropout",
        model="zoo:Convolutional",
        data="zoo:convolutional_data",
        compiled=True,
    ),
    Animal(
        name="U-Net at odd sizes",
        model="zoo:UNet",
        data="zoo:unet_data",
        dynamic={
            "height": {"axes": {"image": 2}, "min": 2, "max": 32},
            "width": {"axes": {"image": 3}, "min": 2, "max": 32},
        },
    ),
    Animal(
        name="LSTM, any length", model="zoo:Recurrent", args={"kind": "lstm"}, data="zoo:token_data", dynamic=TOKENS
    ),
    Animal(name="GRU, any length", model="zoo:Recurrent", args={"kind": "gru"}, data="zoo:token_data", dynamic=TOKENS),
    Animal(
        name="seq2seq with attention, greedy, stops early",
        model="zoo:Seq2Seq",
        args={"stop": True},
        data="zoo:token_data",
        dynamic=SOURCE,
    ),
    Animal(
        name="the same with fixed steps and a mask",
        model="zoo:Seq2Seq",
        args={"stop": False},
        data="zoo:token_data",
        dynamic=SOURCE,
    ),
    Animal(name="beam search, stops early", model="zoo:BeamSearch", data="zoo:token_data", dynamic=SOURCE),
    Animal(
        name="transformer encoder with a padding mask, nested outputs",
        model="zoo:Encoder",
        data="zoo:encoder_data",
        dynamic={"length": {"axes": {"tokens": 1, "padding": 1}, "max": 16}},
    ),
    Animal(
        name="decoder step with a key-value cache",
        model="zoo:CachedDecoder",
        data="zoo:cached_data",
        dynamic={"past": {"axes": {"keys": 1, "values": 1}, "max": 32}},
    ),
    Animal(
        name="recommender with embedding bags",
        model="zoo:Recommender",
        data="zoo:recommender_data",
        dynamic={"length": {"axes": {"history": 1}, "max": 16}},
    ),
    Animal(
        name="graph with scatter",
        model="zoo:Graph",
        data="zoo:graph_data",
        dynamic={"edges": {"axes": {"edges": 1}, "max": 64}},
    ),
    # One way for the whole batch, by its sum.
    Animal(name="Python `if` on data", model="zoo:Branch", data="zoo:branch_data", coupled=True),
    Animal(name="the same with torch.cond", model="zoo:Cond", data="zoo:branch_data", compiled=True, coupled=True),
    Animal(name="an untyped part inside a loop on data", model="zoo:Untyped", data="zoo:branch_data"),
    Animal(
        name="custom C++ operator",
        model="custom:Custom",
        data="custom:custom_data",
        libraries=("libclamp.so",),
        compiled=True,
    ),
)

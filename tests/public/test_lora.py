"""The example with LoRA: merged or refused, resumed, and shipped besides in Hugging Face's layout."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.fixture_types import Ship
from tests.support.killed_example import whole_and_killed
from tests.support.projects import REPOSITORY
from tests.support.training import Train
from torchworker.contract import WEIGHTS
from train_and_ship.infra.fork_server import ForkServer

pytestmark = pytest.mark.public
EXAMPLE = REPOSITORY / "examples" / "lora"


@pytest.fixture(scope="module")
def dates() -> Any:
    """The example's module."""
    if importlib.util.find_spec("peft") is None:
        pytest.skip("no peft: make public asks this file in build/lora")
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield importlib.import_module("dates")
    finally:
        sys.path.remove(str(EXAMPLE))
        sys.modules.pop("dates", None)


# ---- the merge


def adapted(dates: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with an adapter that says something, and samples."""
    torch.manual_seed(0)
    lora = dates.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model = dates.get_peft_model(dates.build_model(width=32, layers=1).bart, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    held_out = dates.build_dataset("validation")
    samples, _ = dates.default_collate([held_out[index] for index in range(16)])
    return model, samples


def forget_a_layer(model: Any) -> None:
    layer = model.base_model.model.model.decoder.layers[0].fc2
    torch.nn.init.zeros_(layer.lora_B["default"].weight)


def add_it_twice(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.scaling["default"] *= 2


def merge_in_half_precision(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.merge()
            module.base_layer.weight.data = module.base_layer.weight.bfloat16().float()


def test_a_merged_model_answers_as_the_adapter_did_and_has_the_weights_of_model_factory(dates: Any) -> None:
    model, samples = adapted(dates)
    with torch.no_grad():
        before = model.eval()(**samples).logits
        with model.disable_adapter():
            untrained = model(**samples).logits
    merged = dates.merge(model, samples)
    with torch.no_grad():
        after = merged(**samples).logits
    assert (before - untrained).abs().max() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert merged.state_dict().keys() == dates.build_model(width=32, layers=1).bart.state_dict().keys()


@pytest.mark.parametrize("wrong", [forget_a_layer, add_it_twice, merge_in_half_precision])
def test_a_merge_that_is_wrong_is_refused(
    dates: Any, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], None]
) -> None:
    model, samples = adapted(dates)
    right = model.merge_and_unload

    def merge_and_unload() -> Any:
        wrong(model)
        return right()

    monkeypatch.setattr(model, "merge_and_unload", merge_and_unload)
    with pytest.raises(
        ValueError, match=r"is not the adapter that was trained: .* up to \S+ from .* explains \S+\. Look"
    ):
        dates.merge(model, samples)


def test_answers_that_are_no_numbers_are_refused_too(dates: Any) -> None:
    trained = torch.randn(2, 3, 4)
    merged = trained.clone()
    merged[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="is not the adapter"):
        dates.require_same(merged, trained, trained.double())


# ---- the folder


def test_a_folder_that_writes_other_tokens_than_the_model_is_refused(dates: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = dates.build_model(width=32, layers=1).eval()
    dates.write_hugging_face(tmp_path / "sound", model)
    # What no file holds.
    model.bart.lm_head.register_forward_hook(lambda _module, _inputs, logits: -logits)
    with pytest.raises(ValueError, match=r"loaded again, the model writes other tokens for 64 of 64 texts"):
        dates.write_hugging_face(tmp_path / "other", model)


# ---- training and the whole flow


def test_a_killed_rank_costs_no_bit_of_what_the_trainer_trains(
    dates: Any, fork_server: ForkServer, tmp_path: Path
) -> None:
    whole, result = whole_and_killed(Train(fork_server, tmp_path), tmp_path, EXAMPLE, 63)
    digests = [hashlib.sha256((tmp_path / f"train{n}" / WEIGHTS).read_bytes()).hexdigest() for n in range(2)]
    assert digests[0] == digests[1]
    timeless = [[{**row, "time": 0} for row in run.history] for run in (whole, result)]
    assert timeless[0] == timeless[1]


# A whole run: two and a half minutes of CPU time.
@pytest.mark.timeout(1800)
def test_what_ship_pull_brings_is_loaded_by_from_pretrained_and_writes_the_trained_models_tokens(
    dates: Any, ship: Ship, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = EXAMPLE / "job.yaml"
    assert len(job.read_text().splitlines()) < 25
    ended = ship("run", str(job))
    assert ended.status == 0, ended.text
    assert ship("pull", "dates", "--to", str(tmp_path / "pulled")).status == 0
    release = tmp_path / "pulled" / "current"
    folder = release / "files" / dates.FOLDER
    assert len(list(folder.glob("model-0000?-of-00006.safetensors"))) == 6
    assert json.loads((folder / "generation_config.json").read_text())["do_sample"] is False

    trained = dates.build_model(**yaml.safe_load(job.read_text())["model"]["args"]).eval()
    trained.load_state_dict(load_file(release / "weights.safetensors"), strict=False)
    texts, answers = zip(*dates.pairs("validation"), strict=True)
    wanted = dates.read_dates(trained.bart, dates.build_tokenizer(), list(texts))
    tokenizer = dates.AutoTokenizer.from_pretrained(folder)
    loaded = dates.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert torch.equal(dates.read_dates(loaded, tokenizer, list(texts)), wanted)
    written = tokenizer.batch_decode(wanted, skip_special_tokens=True)
    assert sum(got == answer for got, answer in zip(written, answers, strict=True)) >= 450
    assert torch.equal(greedy_onnx(release / "model.onnx", tokenizer, list(texts), wanted.shape[1]), wanted)

    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    assert said.getvalue() == "['1987-03-03']\n"


def greedy_onnx(path: Path, tokenizer: Any, texts: list[str], steps: int) -> torch.Tensor:
    """Tokens [batch, steps] that the ONNX file writes one by one, padding behind the end."""
    session = onnxruntime.InferenceSession(path)
    asked = dict(tokenizer(texts, padding=True, return_tensors="np", return_token_type_ids=False))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokens = numpy.full([len(texts), 1], end)
    while tokens.shape[1] < steps:
        (logits,) = session.run(["logits"], {**asked, "decoder_input_ids": tokens})
        ended = (tokens[:, 1:] == end).any(1)
        tokens = numpy.column_stack([tokens, numpy.where(ended, pad, logits[:, -1].argmax(1))])
    return torch.from_numpy(tokens)

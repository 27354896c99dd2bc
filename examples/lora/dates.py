"""Dates as people write them into ISO 8601, by a small BART that LoRA fine-tunes: peft, and transformers' Trainer.

Weights are random and the tokenizer is trained on the spot, so nothing is downloaded; `build_model` and
`build_tokenizer` are the places for `from_pretrained`. Shapes: B batch, S tokens that are read, T tokens that are
written, V vocabulary, N samples of a split.
"""

import calendar
import copy
import datetime
import functools
import random
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

PAD, END = 0, 1
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>"}
READ, WRITTEN = 16, 12
"""The most tokens of a written date, and of an ISO date with its end."""
FOLDER = "hugging_face"


# ---- data


def spelled(day: datetime.date, how: int) -> str:
    month, number = calendar.month_name[day.month].lower(), day.day
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 * (number // 10 != 1), "th")
    return (
        f"{month} {number}{ending}, {day.year}",
        f"the {number}{ending} of {month} {day.year}",
        f"{calendar.day_name[day.weekday()].lower()}, {number} {month[:3]}. {day.year}",
    )[how]


def pairs(split: str) -> list[tuple[str, str]]:
    """4,000 dates of 1900 to 2099 as they are written and as ISO 8601, or 500 others that are held out."""
    drawn = random.Random(0)
    days = drawn.sample(range(datetime.date(1900, 1, 1).toordinal(), datetime.date(2100, 1, 1).toordinal()), 4500)
    dates = [datetime.date.fromordinal(day) for day in (days[:4000] if split == "train" else days[4000:])]
    return [(spelled(date, drawn.randrange(3)), date.isoformat()) for date in dates]


@functools.cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of the training texts, each digit by itself; the same in every process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator((text for pair in pairs("train") for text in pair), trainer)
    end = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=READ, **SPECIAL)


class Dates(Dataset):
    """Items are ({input_ids [S], attention_mask [S], decoder_input_ids [T]}, labels [T]), all int64."""

    def __init__(self, split: str) -> None:
        tokenizer = build_tokenizer()
        texts, answers = zip(*pairs(split), strict=True)
        padded = {"padding": "max_length", "return_tensors": "pt"}
        self.read = tokenizer(list(texts), max_length=READ, **padded)
        ids_NT = tokenizer(list(answers), max_length=WRITTEN, **padded)["input_ids"]
        # What is written begins with the end, as BART's does; of padding no loss is taken.
        self.before_NT = torch.cat([torch.full_like(ids_NT[:, :1], END), ids_NT[:, :-1]], 1)
        self.labels_NT = ids_NT.masked_fill(ids_NT == PAD, -100)

    def __len__(self) -> int:
        return len(self.labels_NT)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        read = {name: self.read[name][index] for name in ("input_ids", "attention_mask")}
        return {**read, "decoder_input_ids": self.before_NT[index]}, self.labels_NT[index]


def build_dataset(split: str) -> Dates:
    return Dates(split)


# ---- model


class DateReader(nn.Module):
    """What the artifacts are: the text and what is written so far → logits [B, T, V] of what follows each token."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.bart = BartForConditionalGeneration(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        said = self.bart(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        )
        return {"logits": said.logits}


def build_model(width: int, layers: int) -> nn.Module:
    """Random weights stand for a pretrained model."""
    ids = {"pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": END}
    sides = ("encoder", "decoder")
    config = BartConfig(
        vocab_size=len(build_tokenizer()),
        d_model=width,
        max_position_embeddings=32,
        # LoRA leaves embeddings as they are: those of a pretrained model tell tokens apart, and so shall these.
        init_std=0.1,
        dropout=0.0,
        forced_eos_token_id=None,
        **{f"{side}_layers": layers for side in sides},
        **{f"{side}_attention_heads": 4 for side in sides},
        **{f"{side}_ffn_dim": 4 * width for side in sides},
        **ids,
    )
    model = DateReader(config)
    model.bart.generation_config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=WRITTEN, **ids)
    return model


def exact_match(logits_BTV: Tensor, target_BT: Tensor) -> float:
    """Share of the dates that are right in every token, which are those that greedy decoding writes right."""
    return (logits_BTV.argmax(2).eq(target_BT) | target_BT.eq(-100)).all(1).double().mean().item()


# ---- training


class Bridge(TrainerCallback):
    """Tells the run what the Trainer measured, and gives it the Trainer's checkpoints."""

    def __init__(self, context) -> None:
        self.context = context

    def on_log(self, args, state, control, logs, **_) -> None:
        names = {"loss": "train_loss", "eval_loss": "validation_loss"}
        if report := {names[name]: value for name, value in logs.items() if name in names}:
            self.context.report(report, step=state.global_step, steps=state.max_steps)

    def on_save(self, args, state, control, **_) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.context.checkpoint.save(step=state.global_step, files=folder)


def collate(items: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    inputs, labels = default_collate(items)
    return {**inputs, "labels": labels}


def main(context, epochs: int, batch_size: int, learning_rate: float, rank: int) -> nn.Module:
    """Called in every rank; the Trainer finds torchrun's environment and the process group."""
    model = context.build_model()
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    adapted = get_peft_model(model.bart, lora)
    trainer = Trainer(
        adapted,
        TrainingArguments(
            output_dir=str(context.folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size // context.world_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            seed=context.seed,
            use_cpu=context.device.type == "cpu",
            ddp_backend="gloo" if context.device.type == "cpu" else None,
            ddp_find_unused_parameters=False,
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            # The run has its own curves and logs.
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=context.build_dataset("train"),
        eval_dataset=(held_out := context.build_dataset("validation")),
        data_collator=collate,
        callbacks=[Bridge(context)],
    )
    saved = context.checkpoint.load()
    trainer.train(resume_from_checkpoint=str(saved.files) if saved else None)
    samples, _ = default_collate([held_out[index] for index in range(64)])
    merge(adapted, {name: tensor.to(context.device) for name, tensor in samples.items()})
    return model


@torch.no_grad()
def merge(adapted: PeftModel, samples: dict[str, Tensor]) -> nn.Module:
    """The model with the adapter added to its weights. Raises ValueError where it is not the one that was trained."""
    adapted.eval()
    trained = adapted(**samples).logits
    exact = copy.deepcopy(adapted).double()(**samples).logits
    merged = adapted.merge_and_unload()
    require_same(merged(**samples).logits, trained, exact)
    return merged


def require_same(merged: Tensor, trained: Tensor, exact: Tensor) -> None:
    """Raises ValueError unless the merged model is as near to the exact one as the adapter's own rounding explains.

    Args:
        merged: its logits, in the model's precision.
        trained: those of the model with its adapter, of the same samples.
        exact: the same in float64.
    """
    far, rounding = (logits.double() - exact for logits in (merged, trained))
    worst, allowed = far.abs().max().item(), 8 * rounding.abs().max().item()
    if not (worst <= allowed and far.square().mean() <= 16 * rounding.square().mean()):
        raise ValueError(
            f"the merged model is not the adapter that was trained: its logits are up to {worst:.2g} from those of the "
            f"adapter in float64, and rounding explains {allowed:.2g}. Look at what merges (merge_and_unload) and at "
            "what of the adapter cannot be merged"
        )


# ---- what is shipped besides


def read_dates(bart: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Tokens [B, at most T + 1] int64 that greedy decoding writes."""
    return bart.generate(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))


def write_hugging_face(folder: Path, model: DateReader) -> None:
    """A folder for `from_pretrained`: shards, configuration, tokenizer. Raises ValueError if it writes other tokens."""
    target = folder / FOLDER
    model.bart.save_pretrained(target, max_shard_size="200KB")
    build_tokenizer().save_pretrained(target)
    texts = [text for text, _ in pairs("validation")[:64]]
    loaded, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    written, again = read_dates(model.bart, build_tokenizer(), texts), read_dates(loaded, tokenizer, texts)
    if not torch.equal(written, again):
        differ = sum(not torch.equal(*rows) for rows in zip(written, again, strict=True))
        raise ValueError(f"{FOLDER}: loaded again, the model writes other tokens for {differ} of {len(texts)} texts")

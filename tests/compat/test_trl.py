"""TRL's trainers on tuned models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mmpeft
from tests.compat.models import ALL, bend, causal, close, plain, untouched
from tests.compat.rows import row

pytest.importorskip("trl")

LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def _tokenizer() -> Any:
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _config(cls: Any, folder: Path, **options: Any) -> Any:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False, "seed": 1}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2, "optim": "sgd"}
    rates = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "gradient_checkpointing": False}
    return cls(output_dir=str(folder), **{**quiet, **sizes, **rates, **options})


def _sft(model: Any, folder: Path, data: Any, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = _config(SFTConfig, folder, max_length=16, **options)
    return SFTTrainer(model, args=config, train_dataset=data, eval_dataset=data, processing_class=_tokenizer())


def _texts(completions: bool) -> Any:
    from datasets import Dataset

    words = [" ".join(LETTERS[i : i + 4]) for i in range(4)]
    if completions:
        return Dataset.from_dict({"prompt": words, "completion": [w[::-1] for w in words]})
    return Dataset.from_dict({"text": words})


FORMS: dict[str, dict[str, Any]] = {
    "text": {},
    "packing": {"packing": True, "max_length": 16},
    "checkpointing": {"gradient_checkpointing": True},
    "smoothing": {"label_smoothing_factor": 0.2},
}


@row(
    "trl",
    "`SFTTrainer.evaluate` and `train` with `Full()`: text, prompt and completion, gradient checkpointing",
    "the losses and weights of training the untouched copy itself",
)
@pytest.mark.parametrize("form", ["text", "completions", "checkpointing"])
def test_supervised(form: str, tmp_path: Path) -> None:
    model = causal(tie_word_embeddings=False)
    before = untouched(model)
    tuning = mmpeft.attach(model, mmpeft.Full())
    data = _texts(form == "completions")
    options = {"gradient_checkpointing": form == "checkpointing"}
    trainers = [_sft(one, tmp_path, data, **options) for one in (before, model)]
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    close(losses[1], losses[0])
    for trainer in trainers:
        trainer.train()
    tuning.merge()
    own = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        close(own[name], parameter, 1e-4)


@row("trl", "`SFTTrainer` with LoRA", "the loss of the merged plain model; what is tuned moves and nothing else")
def test_supervised_lora(tmp_path: Path) -> None:
    model = causal()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)))
    losses = [_sft(one, tmp_path, _texts(False)).evaluate()["eval_loss"] for one in (model, plain(tuning, before))]
    close(losses[0], losses[1], 1e-4)
    was = {n: p.detach().clone() for n, p in tuning.named_parameters()}
    _sft(model, tmp_path, _texts(False)).train()
    assert all(not torch.equal(p, was[n]) for n, p in tuning.named_parameters())
    tuning.detach()
    for name, parameter in before.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


@row("trl", "`DPOTrainer` with an untouched copy as the reference", "the losses and rewards of the merged plain model")
def test_preferences(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = [" ".join(LETTERS[i : i + 4]) for i in range(4)]
    data = Dataset.from_dict({"prompt": words, "chosen": ["a b", "c d", "e f", "g h"], "rejected": ["z y"] * 4})
    model = causal()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)))
    found = []
    for one in (model, plain(tuning, before)):
        config = _config(DPOConfig, tmp_path, max_length=16)
        trainer = DPOTrainer(
            one, untouched(before), args=config, train_dataset=data, eval_dataset=data, processing_class=_tokenizer()
        )
        found.append((trainer.evaluate(), trainer))
    for key in ("eval_loss", "eval_rewards/margins"):
        close(found[0][0][key], found[1][0][key], 1e-3)
    was = {n: p.detach().clone() for n, p in tuning.named_parameters()}
    found[0][1].train()
    assert any(not torch.equal(p, was[n]) for n, p in tuning.named_parameters())

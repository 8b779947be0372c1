"""transformers' Trainer on tuned models: every column kept, every loss that of an untouched copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mmpeft
from tests.compat.models import ALL, bend, causal, close, plain, t5, tuned, untouched, words
from tests.compat.rows import row

ROWS = 8


def _data(rows: int = ROWS, seq2seq: bool = False, ragged: bool = False) -> Any:
    """A data set with a column that no model takes, as the hub's have."""
    from datasets import Dataset

    text = words(rows, 6)
    columns = {"input_ids": text.tolist(), "labels": text.tolist(), "comment": [f"row {i}" for i in range(rows)]}
    columns["attention_mask"] = [[1] * 6] * rows
    if ragged:
        for i in range(rows):
            for name in ("input_ids", "labels", "attention_mask"):
                columns[name][i] = columns[name][i][: 2 + i % 4]
    if seq2seq:
        columns["labels"] = text.flip(1)[:, :4].tolist()
    return Dataset.from_dict(columns)


def _arguments(folder: Path, cls: Any = None, **options: Any) -> Any:
    import transformers as hf

    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no"}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2, "seed": 1}
    rates = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return (cls or hf.TrainingArguments)(output_dir=str(folder), **{**quiet, **sizes, **rates, **options})


def _trainer(model: Any, folder: Path, data: Any = None, collate: Any = None, **options: Any) -> Any:
    import transformers as hf

    data = _data() if data is None else data
    extra = {} if collate is None else {"data_collator": collate}
    return hf.Trainer(model, _arguments(folder, **options), train_dataset=data, eval_dataset=data, **extra)


def _pad(rows: Any) -> dict[str, torch.Tensor]:
    """A collator of the common kind: it takes what the model's signature names."""
    from torch.nn.utils.rnn import pad_sequence

    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: pad_sequence([torch.tensor(r[name]) for r in rows], True, fill)
        for name, fill in fills.items()
        if name in rows[0]
    }


def _losses(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_loss"])


EVALUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.3},
    "prediction loss only": {"prediction_loss_only": True},
    "bf16": {"bf16": True},
    "all columns": {"remove_unused_columns": True},
}


@row("transformers", "`Trainer.evaluate`: default columns, label smoothing, bf16, loss only")
@pytest.mark.parametrize("options", EVALUATIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_evaluate(options: str, kind: str, tmp_path: Path) -> None:
    model = causal(kind)
    before = untouched(model)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL))
    given = EVALUATIONS[options]
    expected = _losses(_trainer(before, tmp_path, **given))
    close(_losses(_trainer(model, tmp_path, **given)), expected)
    bend(tuning)
    expected = _losses(_trainer(plain(tuning, before), tmp_path, **given))
    close(_losses(_trainer(model, tmp_path, **given)), expected, 1e-2 if options == "bf16" else 2e-4)


@row("transformers", "`Trainer.predict`: logits and labels; hidden states and caches as the base's outputs have them")
def test_predict(tmp_path: Path) -> None:
    model = causal()
    _, _, expected = tuned(model)
    got, right = (_trainer(one, tmp_path).predict(_data()) for one in (model, expected))
    close(torch.tensor(got.predictions), torch.tensor(right.predictions), 1e-4)
    assert (got.label_ids == right.label_ids).all()
    close(got.metrics["test_loss"], right.metrics["test_loss"])


def _trained(model: Any, folder: Path, **options: Any) -> Any:
    trainer = _trainer(model, folder, **options)
    trainer.train()
    return trainer


TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.3},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "clipping": {"max_grad_norm": 0.5},
}


@row(
    "transformers",
    "`Trainer.train` with `Full()`: label smoothing, accumulation, clipping, `gradient_checkpointing` both ways",
    "the same losses and weights as training the untouched copy itself",
)
@pytest.mark.parametrize("options", TRAININGS)
def test_full_tuning_trains_as_the_model_itself(options: str, tmp_path: Path) -> None:
    model = causal(tie_word_embeddings=False)
    before = untouched(model)
    for one in (model, before):
        if "reentrant" in options:
            one.enable_input_require_grads()
    tuning = mmpeft.attach(model, mmpeft.Full())
    _trained(before, tmp_path, **TRAININGS[options])
    trainer = _trained(model, tmp_path, **TRAININGS[options])
    assert trainer.state.global_step == 2
    tuning.merge()
    own = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        close(own[name], parameter, 1e-4)


@row(
    "transformers",
    "`Trainer.train` with LoRA; `use_reentrant` both ways",
    "the weights of a loop written by hand on a hand-written LoRA",
)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_lora_trains_as_by_hand(reentrant: bool | None, tmp_path: Path) -> None:
    model = causal()
    before = untouched(model)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, alpha=2.0, at="attn.q"))
    values = {name: parameter.detach().clone() for name, parameter in tuning.named_parameters()}
    given: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    if reentrant is not None:
        model.enable_input_require_grads()
        given |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _trained(model, tmp_path, **given)
    before.train().requires_grad_(False)
    pairs = {}
    for i, layer in enumerate(before.model.layers):
        names = [name for name in values if f"layers.{i}." in name]
        down, up = (next(n for n in names if n.endswith(end)) for end in (".A", ".B"))
        a, b = (torch.nn.Parameter(values[n].clone()) for n in (down, up))
        pairs |= {down: a, up: b}
        layer.self_attn.q_proj.register_forward_hook(lambda m, args, y, a=a, b=b: y + args[0] @ a.T @ b.T)
    optimizer = torch.optim.SGD(pairs.values(), lr=0.1)
    rows = torch.tensor(_data()["input_ids"][:])
    for batch in rows.split(4):
        optimizer.zero_grad()
        before(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    for name, parameter in tuning.named_parameters():
        assert not torch.equal(parameter, values[name])
        close(parameter, pairs[name], 1e-5)


@row("transformers", "`Trainer` with `group_by_length` and a padding collator")
def test_lengths_are_grouped(tmp_path: Path) -> None:
    model = causal()
    before = untouched(model)
    tuning = mmpeft.attach(model, mmpeft.Full())
    given = {"train_sampling_strategy": "group_by_length", "data": _data(ragged=True), "collate": _pad}
    for one in (before, model):
        _trained(one, tmp_path, **given)
    tuning.merge()
    own = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        close(own[name], parameter, 1e-4)


@row(
    "transformers",
    "`Trainer` with `load_best_model_at_end`",
    "the adapter of the best evaluation is back",
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_best_model_is_loaded_at_the_end(kind: str, tmp_path: Path) -> None:
    model = causal(kind)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)), 0.05)
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    best_is_first = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = _trainer(model, tmp_path, **{**steps, **best_is_first, "learning_rate": 1.0})
    snapshots: list[dict[str, Any]] = []

    import transformers as hf

    class Keep(hf.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            snapshots.append({n: t.clone() for n, t in tuning.state_dict().items()})

    trainer.add_callback(Keep())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = max(range(4), key=losses.__getitem__)
    assert losses[-1] < losses[best] * 0.99, f"the best must not be the last for this test to say anything: {losses}"
    close(_losses(trainer), losses[best])
    for name, tensor in tuning.state_dict().items():
        assert torch.equal(tensor, snapshots[best][name])


@row("transformers", "`Trainer` stopped and resumed from its checkpoint", "the weights of the run that was not stopped")
def test_resume(tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = causal()
        tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL))
        given = {
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            "max_steps": 4,
        }
        return tuning, _trainer(model, folder, **{**given, **options})

    whole, trainer = run(tmp_path / "whole")
    trainer.train()
    resumed, trainer = run(tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for name, tensor in whole.state_dict().items():
        close(resumed.state_dict()[name], tensor, 1e-6)


@row("transformers", "`save_model` and `save_pretrained`: the architecture in config.json is the base's")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_architecture_keeps_its_name(kind: str, tmp_path: Path) -> None:
    import transformers as hf

    model = causal(kind)
    before = untouched(model)
    tuning, _, expected = tuned(model)
    _trainer(model, tmp_path).save_model(str(tmp_path / "by_trainer"))
    model.save_pretrained(tmp_path / "by_model")
    for folder in ("by_trainer", "by_model"):
        said = json.loads((tmp_path / folder / "config.json").read_text())["architectures"]
        assert said == [type(before).__name__]
    tuning.merge()
    model.save_pretrained(tmp_path / "merged")
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close(back(words()).logits, expected(words()).logits, 1e-4)
    tuning.unmerge()
    tuning.detach()
    model.save_pretrained(tmp_path / "detached")
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "detached").eval()
    assert torch.equal(back(words()).logits, before(words()).logits)


@row("transformers", "`Seq2SeqTrainer(predict_with_generate=True)`: tokens, losses, label smoothing")
def test_generation_in_evaluation(tmp_path: Path) -> None:
    import transformers as hf

    model = t5()
    tuning, before, expected = tuned(model, at="attn.*|cross.*|mlp.*")
    data = _data(4, seq2seq=True)
    more = {"cls": hf.Seq2SeqTrainingArguments, "predict_with_generate": True, "generation_max_length": 6}
    found = []
    for one in (model, expected, before):
        arguments = _arguments(tmp_path, **more, label_smoothing_factor=0.1)
        trainer = hf.Seq2SeqTrainer(one, arguments, train_dataset=data, eval_dataset=data)
        found.append(trainer.predict(data))
    assert (found[0].predictions == found[1].predictions).all()
    close(found[0].metrics["test_loss"], found[1].metrics["test_loss"], 1e-4)
    assert found[0].metrics["test_loss"] != found[2].metrics["test_loss"]
    trainer = hf.Seq2SeqTrainer(model, _arguments(tmp_path, **more), train_dataset=data, eval_dataset=data)
    was = {n: t.clone() for n, t in tuning.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(t, was[n]) for n, t in tuning.state_dict().items())


@row("transformers", "an image classifier in `Trainer`: columns `pixel_values`, `labels` and a comment")
def test_an_image_classifier(tmp_path: Path) -> None:
    import transformers as hf

    from tests.compat.models import images, seeded

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    model = seeded(lambda: hf.ViTForImageClassification(config))
    _, before, expected = tuned(model)
    rows = [{"pixel_values": x, "labels": i % 5, "comment": "x"} for i, x in enumerate(images(8))]
    losses = [_losses(_trainer(one, tmp_path, data=rows)) for one in (model, expected, before)]
    close(losses[0], losses[1], 1e-4)
    assert losses[0] != losses[2]


@row("transformers", "`Trainer` with `torch_compile` off and `auto_find_batch_size`, `eval_on_start`, `jit` off")
def test_other_loops(tmp_path: Path) -> None:
    model = causal()
    before = untouched(model)
    mmpeft.attach(model, mmpeft.LoRA(rank=2))
    given = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 1, "learning_rate": 0.0}
    histories = []
    for one in (before, model):
        trainer = _trainer(one, tmp_path, **given)
        trainer.train()
        histories.append([e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e])
    close(histories[1], histories[0])

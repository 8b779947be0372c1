"""Image classification from end to end on a tiny random backbone."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from torch import nn

import mmpeft
from mmpeft.errors import AdapterFileError, ConfigError, DataError, SiteError
from mmpeft.run.callbacks import LearningCurves, Outcome
from mmpeft.run.checkpoint import LastCheckpoint, RandomState
from mmpeft.tasks.pictures import picture_grid
from mmpeft.tasks.predictions import PredictionFile
from tests.tasks.tiny import TinyData, classifier, trainer, weights

LR = {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-2)}


def test_learns_and_leaves_everything_behind(tmp_path, capsys):
    data = TinyData(samples=64)
    module = classifier(mmpeft.LoRA(rank=2) + mmpeft.BitFit(), **LR)
    callbacks = [RandomState(), LearningCurves(), Outcome(), LastCheckpoint()]
    run = trainer(tmp_path, max_epochs=5, callbacks=callbacks)
    run.fit(module, data)
    assert data.configured
    assert run.callback_metrics["val/accuracy"] > 0.7
    assert {"val/class_accuracy", "val/calibration_error", "val/loss"} <= set(run.callback_metrics)
    assert len(list(csv.DictReader((tmp_path / "curves.csv").open()))) == 5
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter.json"} <= {path.name for path in (tmp_path / "adapter").iterdir()}
    shown = capsys.readouterr().out
    assert "val/accuracy" in shown
    assert "trainable" in shown
    run.test(module, data, verbose=False)
    table = list(csv.DictReader((tmp_path / "test_classes.csv").open()))
    assert [row["class"] for row in table] == data.classes


def test_checkpoint_holds_only_what_trains(tmp_path):
    module = classifier()
    run = trainer(tmp_path, callbacks=[LastCheckpoint()])
    run.fit(module, TinyData())
    file = tmp_path / "checkpoints" / "last.ckpt"
    held = torch.load(file, weights_only=True)["state_dict"]
    assert set(held) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert sum(tensor.numel() for tensor in held.values()) == module.tuning.report().trainable

    fresh = classifier()
    trainer(tmp_path).test(fresh, TinyData(), ckpt_path=file, verbose=False)
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights(fresh).items())

    with pytest.raises(AdapterFileError, match="another method or task"):
        trainer(tmp_path).test(classifier(mmpeft.BitFit()), TinyData(), ckpt_path=file, verbose=False)
    with pytest.raises(AdapterFileError, match="expected shape"):
        trainer(tmp_path).test(classifier(mmpeft.LoRA(rank=3)), TinyData(), ckpt_path=file, verbose=False)
    other = TinyData()
    other.classes = ["a", "b", "c", "d"]
    with pytest.raises(DataError, match="misread"):
        trainer(tmp_path).test(classifier(), other, ckpt_path=file, verbose=False)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(AdapterFileError, match="no whole checkpoint"):
        trainer(tmp_path).test(classifier(), TinyData(), ckpt_path=file, verbose=False)


def test_base_is_frozen_and_vectors_do_not_decay(tmp_path):
    module = classifier(mmpeft.IA3(), num_classes=4)
    before = {name: p.clone() for name, p in module.prepare().model.named_parameters() if not p.requires_grad}
    run = trainer(tmp_path)
    module = classifier(mmpeft.IA3(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5))
    run.fit(module, TinyData())
    after = dict(module.model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    decay = {p.dim() > 1: group["weight_decay"] for group in run.optimizers[0].param_groups for p in group["params"]}
    assert decay == {True: 0.5, False: 0.0}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_predictions_name_classes_and_probabilities(tmp_path, ending):
    module = classifier(predictions=f"out{ending}")
    run = trainer(tmp_path)
    run.predict(module, TinyData(), return_predictions=False)
    lines = (tmp_path / f"out{ending}").read_text().splitlines()
    if ending == ".csv":
        rows = list(csv.DictReader(lines))
        best = [(row["path"], row["class"], float(row["probability"])) for row in rows]
        assert float(rows[0]["p(class 2)"]) <= best[0][2] + 1e-6
        assert {"class_2", "probability_4"} <= set(rows[0])
    else:
        records = [json.loads(line) for line in lines]
        best = [(r["path"], r["class"], r["probability"]) for r in records]
        assert sum(records[0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert [path for path, _, _ in best] == [f"image{i}.png" for i in range(10)]
    assert {name for _, name, _ in best} <= {f"class {i}" for i in range(4)}
    assert [path.name for path in tmp_path.iterdir()] == [f"out{ending}"]
    with pytest.raises(ConfigError, match=r"\.csv or \.jsonl"):
        PredictionFile("out.txt", lambda outputs, suffix: [])


def test_bad_input_is_refused_before_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("computed before the check"))
    for module, data, error, words in [
        (classifier(), TinyData(shift=2), DataError, "label 4 is out of range|label 5 is out of range"),
        (classifier(), TinyData(shift=-1), DataError, "label -1 is out of range"),
        (classifier(mmpeft.LoRA(at="attn.qq")), TinyData(), SiteError, "attn.q"),
        (classifier(num_classes=7), TinyData(), ConfigError, "num_classes=7"),
    ]:
        with pytest.raises(error, match=words):
            trainer(tmp_path).fit(module, data)
    with pytest.raises(ConfigError, match="expects a method"):
        classifier(method=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="label_smoothing"):
        classifier(label_smoothing=1.5)


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    found = []
    for batch, accumulate in ((8, 1), (4, 2)):
        module = classifier(mmpeft.LoRA(rank=2), **LR)
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=2)
        run.fit(module, TinyData(batch_size=batch))
        assert run.global_step == 8
        found.append(weights(module))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"run": {"precision": "bf16-mixed"}},
        {"recompute": "block"},
        {"recompute": "pointwise", "run": {"precision": "bf16-mixed"}},
        {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
        {"lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_train(tmp_path, options):
    run = trainer(tmp_path, **options.get("run", {}))
    module = classifier(mmpeft.AdaptFormer(bottleneck=4), **{k: v for k, v in options.items() if k != "run"})
    run.fit(module, TinyData())
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_compile_is_per_block(tmp_path, monkeypatch):
    seen: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.append(self))
    module = classifier(compile=True, num_classes=4)
    tuning = module.prepare()
    assert seen == list(tuning.model.blocks)


def test_ema_averages_and_resumes(tmp_path):
    callbacks = lambda: [EMAWeightAveraging(decay=0.5), LastCheckpoint()]  # noqa: E731
    module = classifier(**LR)
    run = trainer(tmp_path, callbacks=callbacks())
    run.fit(module, TinyData())
    file = tmp_path / "checkpoints" / "last.ckpt"
    held = torch.load(file, weights_only=True)
    assert set(held["state_dict"]) == set(held["current_model_state"]) == set(weights(module))
    assert all(torch.equal(tensor, held["state_dict"][name]) for name, tensor in weights(module).items())
    again = trainer(tmp_path, callbacks=callbacks(), max_epochs=2)
    again.fit(classifier(**LR), TinyData(), ckpt_path=file)
    assert again.global_step == 8


def test_pictures_show_what_they_are_given():
    images = torch.zeros(3, 3, 8, 8)
    images[1] = 1
    blank, shown = (picture_grid(own, ["a", "b", "c"]) for own in (torch.ones(3, 3, 8, 8), images))
    dark = [(np.asarray(Image.open(io.BytesIO(png)).convert("L")) < 64).sum() for png in (blank, shown)]
    assert dark[1] > dark[0] + 1000

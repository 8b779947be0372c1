"""The same configuration gives the same numbers under `fit` and `compare`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from mmpeft.cli import main
from tests.support.task_examples import VIT, of

MODEL = of("ImageClassifier", backbone=VIT, optimizer=of("torch.optim.SGD", lr=0.05))
DATA = of("EmojiData", shots=1, batch_size=4)
TRAINER = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
METHOD = "LoRA(rank=1, dropout=0.5).where('depth>=2') + BitFit(at='norm')"


def test_fit_and_compare_draw_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    Path("fit.yaml").write_text(
        yaml.safe_dump({"model": MODEL, "data": DATA, "trainer": {**TRAINER, **quiet}, "method": METHOD})
    )
    assert main(["fit", "-c", "fit.yaml", "--name", "one"]) == 0
    assert main(["fit", "-c", "fit.yaml", "--name", "two", "--method", METHOD, "--trainer.fast_dev_run", "true"]) == 0
    (curves,) = Path("runs").rglob("curves.csv")
    (fitted,) = csv.DictReader(curves.open())
    restricted = of("Restricted", method=of("LoRA", rank=1, dropout=0.5), at="depth>=2")
    whole = of("Union", methods=[restricted, of("BitFit", at="norm")])
    entries = {"call": {"method": METHOD}, "class": {"method": whole}}
    study = {"metric": "val/loss", "seeds": [0], "methods": entries}
    trainer = {**TRAINER, "limit_test_batches": 1}
    Path("compare.yaml").write_text(yaml.safe_dump({**study, "model": MODEL, "data": DATA, "trainer": trainer}))
    assert main(["compare", "-c", "compare.yaml", "--out", "out"]) == 0
    for line in Path("out/results.jsonl").read_text().splitlines():
        metrics = json.loads(line)["metrics"]
        for name in ("train/loss", "val/loss", "val/accuracy"):
            assert metrics[name] == pytest.approx(float(fitted[name]), abs=1e-5)

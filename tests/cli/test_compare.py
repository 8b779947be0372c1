"""What a comparison shows: pictures that the first method gets wrong and another right, and one line in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mmpeft.bench.examples import in_turn
from mmpeft.bench.report import Result, best_beside, in_words
from mmpeft.cli import main
from tests.support.task_examples import VIT, of

TINY: dict[str, Any] = {
    "metric": "test/accuracy",
    "seeds": [0],
    "model": of("ImageClassifier", backbone=VIT, optimizer=of("torch.optim.AdamW", lr=0.01)),
    "data": of("EmojiData", shots=2, batch_size=6, eval_batch_size=64),
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "limit_val_batches": 0, "limit_test_batches": 1},
    "methods": {"probe": {"method": "LinearProbe", "lr": 1e-6}, "BitFit": {"method": "BitFit"}},
}


def answered(out: Path) -> dict[str, dict[str, list[Any]]]:
    runs = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {run["method"]: json.loads((out / "answers" / f"{run['key']}.json").read_text()) for run in runs}


def test_a_comparison_shows_what_the_better_method_gained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    first = ["compare", "-c", "tiny.yaml", "--out", "out", "--no-adapters"]
    assert main([*first, "--methods", "probe"]) == 0
    out = Path("out")
    assert not (out / "examples.png").exists()  # nothing to compare with
    before = (out / "results.jsonl").read_text()
    assert main(first) == 0
    assert (out / "results.jsonl").read_text().startswith(before)  # the first run is kept, and its answers with it
    found = answered(out)
    for run in map(json.loads, (out / "results.jsonl").read_text().splitlines()):
        own = found[run["method"]]
        right = torch.tensor(own["labels"]) == torch.tensor(own["predicted"])
        assert float(right.float().mean()) == pytest.approx(run["score"], abs=1e-6)
        assert 0 < run["trainable"] < run["total"]
    with Image.open(out / "examples.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 800  # a row of eight
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith("BitFit 0.")
    assert "of probe (test/accuracy), with 0.4 % of the parameters" in said
    shown, trained = ((out / name).read_bytes() for name in ("examples.png", "results.jsonl"))
    (out / "examples.png").unlink()
    # by another metric the same runs are scored anew, and nothing is trained
    assert main([*first, "--metric", "test/loss"]) == 0
    assert (out / "examples.png").read_bytes() == shown
    assert (out / "results.jsonl").read_bytes() == trained
    assert "(test/loss)" in capsys.readouterr().out
    assert "loss, seed 0" in (out / "table.md").read_text()


def result(method: str, score: float, seed: int = 0, trainable: int = 5, total: int = 1000, **setting: Any) -> Result:
    return Result(f"{method}{seed}{setting}", method, seed, score, trainable, 1, 1.0, 1, setting=setting, total=total)


def test_the_best_method_trains_a_part_where_one_does() -> None:
    probe, lora, full = result("probe", 0.5), result("LoRA", 0.7), result("full", 0.9, trainable=1000)
    assert best_beside([probe, lora, full], "probe", "accuracy") == ([probe], [lora])
    assert best_beside([probe, full], "probe", "accuracy") == ([probe], [full])
    assert best_beside([lora, full], "probe", "accuracy") is None  # its run diverged
    assert best_beside([probe], "probe", "accuracy") is None
    assert best_beside([probe, result("LoRA", float("nan"))], "probe", "accuracy") is None
    other = result("BitFit", 0.6)
    assert best_beside([probe, lora, other], "probe", "test/loss") == ([probe], [other])
    few, many = ([result(r.method, r.score + n / 100, shots=n) for r in (probe, lora)] for n in (1, 8))
    assert best_beside([*few, *many], "probe", "accuracy") == (many[:1], many[1:])


@pytest.mark.parametrize(
    ("scores", "metric", "said"),
    [
        ((0.7, 0.72), "test/accuracy", "LoRA 0.710 ± 0.014 against 0.500 ± 0.014 of probe"),
        ((0.51, 0.53), "test/accuracy", "within the spread of the seeds: LoRA 0.520"),
        ((0.4, 0.42), "test/accuracy", "no method is better than probe: LoRA 0.410"),
        ((0.4, 0.42), "test/loss", "LoRA 0.410 ± 0.014 against 0.500 ± 0.014 of probe (test/loss)"),
    ],
)
def test_one_line_says_what_was_seen(scores: tuple[float, float], metric: str, said: str) -> None:
    probe = [result("probe", score, seed) for seed, score in enumerate((0.49, 0.51))]
    lora = [result("LoRA", score, seed) for seed, score in enumerate(scores)]
    line = in_words(probe, lora, metric)
    assert line.startswith(said)
    assert line.endswith("with 0.5 % of the parameters")
    assert "parameters" not in in_words(probe, [replace(run, total=0) for run in lora], metric)


def test_pictures_are_of_all_classes_in_turn() -> None:
    labels = [0, 0, 0, 1, 2, 2]
    assert in_turn([0, 1, 2, 3, 5], labels) == [0, 3, 5, 1, 2]

"""Continual learning on tiny models: every learner, resumption, the bank's promises, and metrics by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.bank import Bank, LinearHead
from mmpeft.cli import main
from mmpeft.data.images import ImageData, Pairs
from mmpeft.errors import ConfigError, DataError
from mmpeft.vision.continual import methods as learners
from mmpeft.vision.continual.data import EmojiKinds, TaskSequence, split
from mmpeft.vision.continual.learner import Learner
from mmpeft.vision.continual.metrics import summary
from mmpeft.vision.continual.runner import ContinualClassifier
from tests.tasks.tiny import BACKBONE, SMALL

OPTIONS = {
    "RanPAC": {"size": 32},
    "LAE": {"method": mmpeft.AdaptFormer(at="mlp", bottleneck=4), "decay": 0.5},
    "DualPrompt": {
        "method": mmpeft.PTuningV2(at="kv & depth>=1", tokens=2),
        "general": mmpeft.PTuningV2(at="kv & depth=0"),
    },
    "L2P": {"pool": 4, "top": 2},
    "CODAPrompt": {"components": 3},
}


class Colours(ImageData):
    """Images of one brightness a class, with noise."""

    def __init__(self, classes: int = 6, samples: int = 4, batch_size: int = 4, seed: int = 0, empty: int = -1) -> None:
        super().__init__(batch_size, 0, seed, 16, image_size=32, augment="none")
        self.classes, self.samples, self.empty = [f"c{i}" for i in range(classes)], samples, empty

    def datasets(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(self.samples * len(self.classes)) % len(self.classes)
        labels = labels[labels != self.empty]
        noise = torch.randint(0, 30, (len(labels), 3, 32, 32), generator=generator)
        shade = torch.stack([labels * 40, 200 - labels * 40, labels % 2 * 200], 1)[:, :, None, None]
        images = (noise + shade).clamp(0, 255).to(torch.uint8)
        self.train_set = self.test_set = Pairs(images, labels)


def classifier(learner: Learner, increment: int = 2, **options) -> ContinualClassifier:
    torch.manual_seed(0)
    data = options.pop("data", None) or Colours()
    options = {"epochs": 1, "lr": 1e-2, "order": 1993, "trainer": {"accelerator": "cpu"}, **options}
    options = {"initial": increment, "pretrained": False, "model_args": SMALL, **options}
    return ContinualClassifier(learner, data, BACKBONE, increment=increment, **options)


def built(name: str) -> Learner:
    return getattr(learners, name)(**OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", sorted(learners.__all__))
def test_every_learner_leaves_the_past_alone_and_looks_at_each_image_alone(name: str) -> None:
    run = classifier(built(name))
    base = {k: v.clone() for k, v in run.model.state_dict().items()}
    frozen: dict[str, list[torch.Tensor]] = {}
    end = run.learner.end

    def watched(task, samples) -> None:
        bank = run.learner.bank
        for entry, tensors in frozen.items():
            if entry in bank.ids:
                assert all(map(torch.equal, tensors, bank.parameters_of(entry))), entry
        end(task, samples)
        own = [] if isinstance(run.learner, learners.Finetune) else bank.ids  # the bounds train everything again
        own = [e for e in own if e.startswith(("t", "head")) or e == "first"]
        frozen.update({e: [p.detach().clone() for p in bank.parameters_of(e)] for e in own if bank[e].frozen})

    run.learner.end = watched  # type: ignore[method-assign]
    record = run.run()
    assert [len(row) for row in record.matrix] == [1, 2, 3]
    state = run.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in base.items())
    images = torch.stack([run.data.eval_transform((run.data.test_set[i][0], 0))[0] for i in range(7)])
    with torch.no_grad():
        together = run.learner.scores(images)
        alone = torch.cat([run.learner.scores(image[None]) for image in images])
        order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
        shuffled = run.learner.scores(images[order])
    assert together.shape == (7, 6)
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.allclose(shuffled, together[order], atol=1e-5)


@pytest.mark.parametrize("name", ["SDLoRA", "EASE", "InfLoRA", "RanPAC", "CODAPrompt"])
def test_an_interrupted_sequence_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    whole = classifier(built(name)).run()
    run = classifier(built(name))
    tasks = run.sequence.tasks
    run.sequence.tasks = tasks[:2]
    run.run(tmp_path, "key")
    again = classifier(built(name))
    learned = []
    begin = again.learner.begin
    again.learner.begin = lambda task, samples: (learned.append(task.number), begin(task, samples))  # type: ignore
    record = again.run(tmp_path, "key")
    assert learned == [2]
    assert record.matrix == whole.matrix
    assert classifier(built(name)).run(tmp_path, "other").matrix == whole.matrix


def test_simple_cil_does_not_depend_on_the_increment() -> None:
    rows = [classifier(learners.SimpleCIL(), increment).run() for increment in (1, 2, 6)]
    last = [summary(r.square(), r.counts).last for r in rows]
    assert last[0] == pytest.approx(last[1])
    assert last[0] == pytest.approx(last[2])


def test_past_branches_of_inflora_take_no_more_memory() -> None:
    run = classifier(learners.InfLoRA(mmpeft.LoRA(rank=16, alpha=16.0, at="attn.{k,v}")), 1)
    sizes = []
    end = run.learner.end

    def watched(task, samples) -> None:
        end(task, samples)
        sizes.append(sum(p.numel() for p in run.learner.bank.parameters_of("past")))

    run.learner.end = watched  # type: ignore[method-assign]
    run.run()
    assert len(sizes) == 6
    assert sizes[-1] == sizes[2]


def test_metrics_by_hand() -> None:
    nan = float("nan")
    found = summary([[0.9, nan, nan], [0.6, 0.8, nan], [0.3, 0.9, 1.0]], [10, 20, 10])
    assert found.curve == pytest.approx((0.9, (6 + 16) / 30, (3 + 18 + 10) / 40))
    assert found.average == pytest.approx(np.mean(found.curve))
    assert found.forgetting == pytest.approx(((0.9 - 0.3) + 0.0) / 2)
    assert found.backward == pytest.approx(((0.3 - 0.9) + (0.9 - 0.8)) / 2)
    assert found.forward is None
    ahead = summary([[0.9, 0.4], [0.6, 0.8]], [1, 1], [0.5, 0.25])
    assert ahead.forward == pytest.approx(0.15)
    assert summary([[0.5]], [3]).forgetting == 0.0
    with pytest.raises(DataError, match="square"):
        summary([[0.5, 0.5]], [1])
    with pytest.raises(DataError, match="diagonal"):
        summary([[1.5]], [1])
    with pytest.raises(ConfigError, match="test samples"):
        summary([[0.5]], [1, 2])


def test_the_order_of_classes_is_that_of_the_literature() -> None:
    sequence = TaskSequence(Colours(), 2, 3, order=1993)
    expected = np.random.RandomState(1993).permutation(6).tolist()
    assert sequence.classes == [f"c{i}" for i in expected]
    assert [list(t.classes) for t in sequence.tasks] == [[0, 1], [2, 3, 4], [5]]
    (_, labels), *_ = sequence.testing(range(2, 5))
    assert set(labels.tolist()) == {2, 3, 4}


def test_bad_input() -> None:
    with pytest.raises(DataError, match="no train samples of c3: a task would be empty"):
        TaskSequence(Colours(empty=3), 2, 2)
    with pytest.raises(ConfigError, match="initial"):
        split(4, 5, 1)
    with pytest.raises(ConfigError, match="increment"):
        split(4, 2, 0)
    with pytest.raises(DataError, match="no subcategory"):
        EmojiKinds(least=500, most=600)
    run = classifier(learners.OLoRA())
    run.learner.bind(Bank(run.model), 32)
    run.learner.begin(run.sequence.tasks[0], [])
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(DataError, match=r"label 5 is outside this task: its classes are \[0, 1\]"):
        run.learner.loss(images, torch.tensor([5]))
    head = LinearHead(4, [0, 1])
    with pytest.raises(DataError, match="integer labels"):
        head.columns(torch.tensor([0.5]))
    with pytest.raises(ConfigError, match="controllers"):
        classifier(learners.APER(mmpeft.AdaLoRA())).run()


CONFIG = """
title: tiny
seeds: [1993, 1994]
run: {backbone: "embedded:vit_emoji", initial: 2, increment: 2, epochs: 1}
data: {class_path: EmojiKinds, init_args: {least: 40, most: 40, least_test: 10, batch_size: 64}}
methods:
  means: {learner: {class_path: SimpleCIL}}
"""


def test_the_command_writes_table_matrices_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "continual.yaml"
    config.write_text(CONFIG)
    out = tmp_path / "out"
    for _ in range(2):  # the second time everything is there
        assert main(["continual", "-c", str(config), "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert [r["seed"] for r in found] == [1993, 1994]
    assert all(0 < r["metrics"]["last"] <= 1 for r in found)
    assert "| means |" in (out / "table.md").read_text()
    assert (out / "matrices.png").read_bytes()[:4] == b"\x89PNG"
    config.write_text(CONFIG.replace("SimpleCIL", "SimpleCLI"))
    assert main(["continual", "-c", str(config), "--out", str(out)]) == 2
    assert "SimpleCLI" in capsys.readouterr().err
    config.write_text(CONFIG.replace("title", "titel"))
    assert main(["continual", "-c", str(config), "--out", str(out)]) == 2
    assert "Did you mean 'title'" in capsys.readouterr().err

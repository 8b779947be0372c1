"""Towers in which nothing trains stay in evaluation mode; those with parts or trained tensors do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.sites import Site
from mmpeft.tasks.frozen import frozen_towers
from mmpeft.vision.classification.task import ImageClassifier
from tests.tasks.tiny import BACKBONE, SMALL, TinyData, classifier, trainer


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"drop": nn.Dropout(), "blocks": nn.ModuleList([nn.Linear(2, 2)])})
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])
        self.scale = nn.Parameter(torch.ones(()))


BLOCKS = [Site("visual.blocks.0", "block", tower="image"), Site("blocks.0", "block", tower="text")]


@pytest.mark.parametrize(
    ("trained", "homes", "expected"),
    [
        ([], [], [""]),
        (["scale"], [], ["visual", "blocks"]),
        (["blocks.0.weight"], [], ["visual"]),
        (["scale"], ["visual.blocks.0"], ["blocks"]),
        ([], ["blocks.0"], ["visual"]),
        (["visual.blocks.0.bias", "blocks.0.bias"], [], []),
    ],
)
def test_what_stays_in_evaluation_mode(trained: list[str], homes: list[str], expected: list[str]) -> None:
    pair = Pair().requires_grad_(False)
    for name in trained:
        pair.get_parameter(name).requires_grad_(True)
    found = frozen_towers(pair, BLOCKS, homes)
    assert found == [pair.get_submodule(path) for path in expected]


class Recording(ImageClassifier):
    """A task that asks in `start` in which mode the backbone is."""

    def start(self) -> None:
        assert self.model is not None
        self.mode_at_start = self.model.training
        super().start()


@pytest.mark.parametrize(("method", "moves"), [(mmpeft.LoRA(rank=2), True), (mmpeft.methods.Frozen(), False)])
def test_what_start_keeps_of_a_frozen_tower_is_without_dropout(method: mmpeft.methods.Method, moves: bool) -> None:
    small = {"pretrained": False, "model_args": SMALL, "num_classes": 4}
    task = Recording(BACKBONE, method, train_head=False, **small)
    task.prepare()
    assert task.mode_at_start is moves


@pytest.mark.parametrize(("method", "moves"), [(mmpeft.LoRA(rank=2), True), (mmpeft.methods.Frozen(), False)])
def test_dropout_of_a_backbone_runs_where_something_in_it_trains(method: mmpeft.methods.Method, moves: bool, tmp_path):
    module = classifier(method, train_head=False)
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, TinyData())
    module.train()
    assert module.model.training is moves
    assert module.eval().model.training is False

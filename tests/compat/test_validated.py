"""The suite's own tasks: evaluated first, in inference mode, and fitted afterwards by the same module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from mmpeft.vla.segmentation.data import SceneSegmentationData
from mmpeft.vla.segmentation.decoders import CLIPSegDecoder
from mmpeft.vla.segmentation.task import Segmenter
from tests.compat.rows import row
from tests.tasks import test_vqa
from tests.tasks.tiny import TinyData, classifier, trainer


def _trainer(folder: Path, **options: Any) -> Any:
    return trainer(folder, limit_train_batches=2, limit_val_batches=2, limit_test_batches=2, **options)


def _validated_then_fitted(module: lightning.LightningModule, data: Any, folder: Path) -> None:
    """What evaluation leaves behind spoils neither training nor an evaluation of another mode."""
    scores = [_trainer(folder).validate(module, data, verbose=False)[0] for _ in range(2)]
    assert scores[0] == scores[1], "an evaluation has changed the next one"
    was = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    _trainer(folder).fit(module, data)
    assert any(not torch.equal(p, was[n]) for n, p in module.named_parameters() if n in was)
    _trainer(folder).test(module, data, verbose=False)
    with_gradients = _trainer(folder, inference_mode=False)
    first = with_gradients.validate(module, data, verbose=False)[0]
    assert first == _trainer(folder).validate(module, data, verbose=False)[0]


@row(
    "lightning",
    "the suite's own modules: `validate` and `test` before and between `fit`, in and out of inference mode",
    "trains, and the same scores in both modes",
)
@pytest.mark.parametrize("options", [{}, {"mixup": 0.2, "label_smoothing": 0.1}], ids=str)
def test_a_classifier_is_evaluated_first(options: dict[str, Any], tmp_path: Path) -> None:
    _validated_then_fitted(classifier(**options), TinyData(), tmp_path)


@row(
    "lightning",
    "segmentation and visual questions: `validate` and `test` before and between `fit`",
    "trains, and the same scores in both modes",
)
@pytest.mark.parametrize("task", ["segmentation", "questions"])
def test_a_dense_task_is_evaluated_first(task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if task == "segmentation":
        data: Any = SceneSegmentationData(scenes=8, eval_scenes=8, batch_size=4, eval_batch_size=4, image_size=64)
        module: Any = Segmenter(
            "embedded:clip_emoji", None, CLIPSegDecoder(width=16, heads=2), template="a drawing of a {}", image_size=64
        )
    else:
        test_vqa.pair.__wrapped__(monkeypatch)
        data, module = test_vqa.scenes(), test_vqa.task()
    _validated_then_fitted(module, data, tmp_path)

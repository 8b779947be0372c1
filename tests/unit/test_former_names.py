"""Modules under the names they had before."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from mmpeft import _moved


@pytest.mark.parametrize("former", sorted(_moved.MOVED))
def test_a_former_module_is_the_present_one_and_says_so(former: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, former, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{former} is now {_moved.MOVED[former]}"):
        found = import_module(former)
    assert found is import_module(_moved.MOVED[former])


@pytest.mark.parametrize(
    "name",
    [
        "mmpeft.training.module.TuningModule",
        "mmpeft.training.data.DataModule",
        "mmpeft.training.image_data.ImageData",
        "mmpeft.vision.classification.ImageClassifier",
        "mmpeft.vla.contrastive.ContrastiveTuner",
        "mmpeft.vla.data.captions.CaptionData",
        "mmpeft.vla.data.segmentation.SceneSegmentationData",
        "mmpeft.diffusion.style.StyleTuner",
        "mmpeft.diffusion.words.WordTuner",
    ],
)
@pytest.mark.filterwarnings("ignore:.* is now .*:DeprecationWarning")
def test_what_people_have_written_imports_of_is_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert getattr(import_module(module), attribute).__name__ == attribute

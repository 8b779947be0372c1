"""Modules under the names they had before: importing one says where it is now, and gives the same module."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("mmpeft.training", "mmpeft.vla.data")
MOVED = {
    "mmpeft.training.data": "mmpeft.data.loading",
    "mmpeft.training.image_data": "mmpeft.data.images",
    "mmpeft.training.captioned": "mmpeft.data.captioned",
    "mmpeft.training.caption_sources": "mmpeft.data.caption_sources",
    "mmpeft.training.pictures": "mmpeft.data.pictures",
    "mmpeft.training.transforms": "mmpeft.data.transforms",
    "mmpeft.training.module": "mmpeft.tasks.module",
    "mmpeft.training.control": "mmpeft.tasks.control",
    "mmpeft.training.metrics": "mmpeft.tasks.metrics",
    "mmpeft.training.schedule": "mmpeft.tasks.schedule",
    "mmpeft.training.callbacks": "mmpeft.run.callbacks",
    "mmpeft.training.checkpoint": "mmpeft.run.checkpoint",
    "mmpeft.training.cli": "mmpeft.run.cli",
    "mmpeft.training.arguments": "mmpeft.run.arguments",
    "mmpeft.training.run": "mmpeft.run.reload",
    "mmpeft.bench.written": "mmpeft.run.written",
    "mmpeft.vision.data.files": "mmpeft.data.files",
    "mmpeft.vision.board": "mmpeft.vision.classification.draw",
    "mmpeft.vision.predict": "mmpeft.tasks.predictions",
    "mmpeft.vision.pretraining": "mmpeft.vision.pretrain",
    "mmpeft.vla.data.captions": "mmpeft.vla.contrastive.data",
    "mmpeft.vla.data.few_shot": "mmpeft.vla.fewshot.data",
    "mmpeft.vla.data.segmentation": "mmpeft.vla.segmentation.data",
    "mmpeft.vla.data.masks": "mmpeft.vla.segmentation.masks",
    "mmpeft.vla.data.vqa": "mmpeft.vla.vqa.data",
    "mmpeft.vla.data.questions": "mmpeft.vla.vqa.questions",
    "mmpeft.vla.pretraining": "mmpeft.vla.pretrain",
    "mmpeft.vla.region_pretraining": "mmpeft.vla.pretrain_regions",
    "mmpeft.diffusion.grid": "mmpeft.diffusion.style.grid",
    "mmpeft.diffusion.evaluation": "mmpeft.diffusion.style.evaluation",
    "mmpeft.diffusion.judge": "mmpeft.diffusion.style.judge",
    "mmpeft.diffusion.pair_judge": "mmpeft.diffusion.style.pair_judge",
    "mmpeft.diffusion.emoji_judge": "mmpeft.diffusion.style.emoji_judge",
    "mmpeft.diffusion.command": "mmpeft.diffusion.style.command",
    "mmpeft.diffusion.mix": "mmpeft.diffusion.style.mix",
    "mmpeft.diffusion.slider": "mmpeft.diffusion.style.slider",
    "mmpeft.diffusion.words": "mmpeft.diffusion.style.words",
    "mmpeft.diffusion.cache": "mmpeft.diffusion.style.cache",
    "mmpeft.diffusion.pretraining": "mmpeft.diffusion.pretrain",
    "mmpeft.diffusion.input_facts": "mmpeft.diffusion.inputs.facts",
    "mmpeft.diffusion.input_images": "mmpeft.diffusion.inputs.images",
    "mmpeft.diffusion.input_rules": "mmpeft.diffusion.inputs.rules",
    "mmpeft.diffusion.input_sounds": "mmpeft.diffusion.inputs.sounds",
    "mmpeft.diffusion.input_videos": "mmpeft.diffusion.inputs.videos",
    "mmpeft.llm.request": "mmpeft.llm.inputs.request",
    "mmpeft.llm.text_inputs": "mmpeft.llm.inputs.texts",
    "mmpeft.llm.pixel_inputs": "mmpeft.llm.inputs.pixels",
    "mmpeft.llm.sound_inputs": "mmpeft.llm.inputs.sounds",
    "mmpeft.llm.series_inputs": "mmpeft.llm.inputs.series",
}


class FormerNames(MetaPathFinder, Loader):
    """Finds what `MOVED` names, after every other finder."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname in MOVED or fullname in PACKAGES:
            return ModuleSpec(fullname, self, is_package=fullname in PACKAGES)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put the moved module in the place of the one that Python has made under the former name."""
        name = module.__name__
        if name in MOVED:
            warnings.warn(f"{name} is now {MOVED[name]}", DeprecationWarning, stacklevel=2)
            sys.modules[name] = import_module(MOVED[name])


def install() -> None:
    """Make former names importable; once."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())

"""What accelerate does to a model by hooks, and a model to do it to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mmpeft
from tests.compat.models import ALL, causal, untouched, words


def cpu(model: Any, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def disk(model: Any, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def mapped(model: Any, folder: Path) -> None:
    """Half the blocks on the CPU, the others on the disk."""
    from accelerate import dispatch_model

    names = [name for name, module in model.named_children() if list(module.parameters(recurse=True))]
    device_map: dict[str, Any] = {}
    for name in names:
        child = getattr(model, name)
        inner = getattr(child, "layers", None)
        if inner is None:
            device_map[name] = "cpu"
            continue
        for part, module in child.named_children():
            if part != "layers" and list(module.parameters()):
                device_map[f"{name}.{part}"] = "cpu"
            elif part == "layers":
                device_map |= {f"{name}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(module))}
            else:
                device_map[f"{name}.{part}"] = "cpu"
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def aligned(model: Any, folder: Path) -> None:
    """A hook on every module and nothing moved: what a model on several accelerators has."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True), append=True)


HOOKS: dict[str, Callable[[Any, Path], None]] = {"cpu": cpu, "disk": disk, "map": mapped, "aligned": aligned}


def answer(model: Any) -> torch.Tensor:
    return model(words()).logits


def pair() -> tuple[Any, Any, Any]:
    """A model, its untouched copy and the method."""
    model = causal(tie_word_embeddings=False)
    return model, untouched(model), mmpeft.LoRA(rank=2, at=ALL)

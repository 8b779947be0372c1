"""Text-to-image pipelines by name: hub, local folders of diffusers' layout, and those that ship with the suite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from mmpeft.diffusion.pipeline import PixelPipeline
from mmpeft.embedded.store import WEIGHTS
from mmpeft.errors import ConfigError, nearest
from mmpeft.hub.reach import from_hub, why_not
from mmpeft.types import Facts, Kwargs, Untyped

INDEX = "model_index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHERE = "name a repository that this machine can reach, a folder of diffusers' layout, or embedded:unet_emoji"


def create(name: str, dtype: torch.dtype = torch.float32, quantization: Facts | None = None) -> Untyped:
    """A pipeline on the CPU, in evaluation mode.

    Args:
        name: a hub repository, a folder of diffusers' layout, or `embedded:<name>`.
        dtype: of all its weights; what trains is fp32 whatever it is.
        quantization: arguments of diffusers' `PipelineQuantizationConfig`, which quantises the named parts.

    Raises:
        ConfigError: no such folder, a folder without safetensors, or weights that cannot be fetched.
    """
    folder = folder_of(name)
    options: Kwargs = {"use_safetensors": True}
    if quantization is not None:
        options["quantization_config"] = quantized(quantization)
    if dtype != torch.float32 or quantization is not None:  # torchao's own choice is bfloat16
        options["torch_dtype"] = dtype
    own = folder is not None and _class_of(folder) == PixelPipeline.__name__
    try:
        with from_hub() if folder is None else nullcontext():
            pipeline = (PixelPipeline if own else DiffusionPipeline).from_pretrained(str(folder or name), **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        remedy = WHERE if quantization is None else "bitsandbytes is loaded on GPUs alone: elsewhere use torchao"
        raise ConfigError(f"cannot load {name}: {reason_of(error, folder is None)}; {remedy}") from error
    if quantization is None:
        pipeline.to(dtype)  # transformers reads weights in the type of their file
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reason_of(error: Exception, from_the_hub: bool) -> str:
    """Why a pipeline could not be loaded, in one line."""
    return why_not().strip(" ()") if from_the_hub and why_not() else " ".join(str(error).split())[:300]


def quantized(facts: Facts) -> Untyped:
    """diffusers' config. For `quant_backend: torchao`, `quant_type` is the name of one of torchao's own configs.

    Raises:
        ConfigError: unknown arguments, an unknown back end, or one that is not installed.
    """
    from diffusers import PipelineQuantizationConfig

    try:
        if facts.get("quant_backend") == "torchao":
            return PipelineQuantizationConfig(quant_mapping=_torchao(**{**facts, "quant_backend": ""}))
        return PipelineQuantizationConfig(**facts)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"quantization={dict(facts)}: {' '.join(str(error).split())[:300]}") from error


def _torchao(quant_backend: str, components_to_quantize: Sequence[str], quant_kwargs: Facts) -> Kwargs:
    """By component, because diffusers and transformers have different classes for the same settings."""
    import diffusers
    import transformers

    known, name = import_module("torchao.quantization"), str(quant_kwargs.get("quant_type"))
    if not hasattr(known, name):
        raise ConfigError(f"torchao has no {name!r}; name one of its configs, such as Int8WeightOnlyConfig")
    rest = {key: value for key, value in quant_kwargs.items() if key != "quant_type"}
    return {
        part: (transformers if part.startswith("text") else diffusers).TorchAoConfig(getattr(known, name)(**rest))
        for part in components_to_quantize
    }


def folder_of(name: str) -> Path | None:
    """The folder a name stands for; None for names of the hub.

    Raises:
        ConfigError: there is no such folder, or no such embedded pipeline.
    """
    if name.startswith("embedded:"):
        own = name.removeprefix("embedded:")
        known = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{INDEX}"))
        if own not in known:
            raise ConfigError(
                f"no embedded pipeline {own!r}; embedded: {', '.join(known) or 'none'}.{nearest(own, known)}"
            )
        return WEIGHTS / own
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise ConfigError(f"{path} has no {INDEX}; expected a folder as diffusers' save_pretrained writes it")
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"there is no folder {path}")
    return None


def _class_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / INDEX).read_text("utf-8")).get("_class_name", ""))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX} is no JSON: {error}") from error

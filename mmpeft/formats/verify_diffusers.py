"""Written files in diffusers' hands: its own loaders read them into a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from mmpeft.errors import AdapterFileError
from mmpeft.formats.content import Content
from mmpeft.formats.verify import REFUSALS, Check, adapters, compare, expected, plain_copy, quiet
from mmpeft.hosting.host import original_class
from mmpeft.types import AnyModule, Untyped

MIXINS = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
}
"""Denoiser → the mixin of the pipeline that reads its files; any other is read as Stable Diffusion's."""
FLUX_WIDTH = 3072
"""What diffusers' converter of kohya's Flux files has written into it."""


def unread_by_diffusers(content: Content, models: Mapping[str, nn.Module]) -> str:
    """Why diffusers is no judge of a file; empty when it is. What other readers make of it is in docs/readers.md."""
    if content.format != "kohya":
        return ""
    if content.shifts or any("diff" in layer.tensors for layer in content.layers):
        return "diffusers reads no full differences"
    if any(layer.tensors for layer in content.layers):
        return "diffusers reads no LoHa and LoKr"
    if any(layer.magnitude is not None for layer in content.layers):
        return "diffusers drops dora_scale"
    for model in models.values():
        name = original_class(model).__name__
        if name == "FluxTransformer2DModel":
            config: Untyped = model.config
            if config.num_attention_heads * config.attention_head_dim != FLUX_WIDTH:
                return f"diffusers reads kohya names of a {name} of the width {FLUX_WIDTH} only"
        elif "UNet" not in name and "CLIPText" not in name:
            return f"diffusers reads no kohya names of a {name}"
    return ""


def by_diffusers(
    model: nn.Module, file: Path, component: str, content: Content, models: Mapping[str, nn.Module]
) -> list[Check]:
    """Load a file through diffusers; empty where the model's class loads none, or without peft.

    Raises:
        AdapterFileError: it refuses the file, or finds other layers or values than were written.
    """
    text = component.startswith("text_encoder")
    if not (text or hasattr(model, "load_lora_adapter")) or find_spec("peft") is None:
        return []
    twin: AnyModule = plain_copy(model)
    reader = f"diffusers {version('diffusers')}"
    kinds = [MIXINS[original_class(m).__name__] for m in models.values() if original_class(m).__name__ in MIXINS]
    loader: Untyped = getattr(
        import_module("diffusers.loaders.lora_pipeline"), (*kinds, "StableDiffusionLoraLoaderMixin")[0]
    )
    with quiet():
        try:
            _load(loader, model, twin, file, component, content)
        except REFUSALS as error:
            raise AdapterFileError(f"{reader} refuses the file that was written: {error}") from error
    wanted, got = expected(content), adapters(twin, "default")
    if content.format == "kohya" and component == "transformer":  # rows of zeros in a fused module are no layer
        wanted, got = ({name: t for name, t in side.items() if t.any()} for side in (wanted, got))
    return [compare(reader, wanted, got)]


def _load(loader: Untyped, model: nn.Module, twin: AnyModule, file: Path, component: str, content: Content) -> None:
    if not component.startswith("text_encoder") and content.format != "kohya":
        twin.load_lora_adapter(
            str(file.parent), weight_name=file.name, prefix=component, adapter_name="default", local_files_only=True
        )
        return
    options = {"local_files_only": True, "return_lora_metadata": True}
    if "UNet" in type(model).__name__:
        options["unet_config"] = twin.config
    state, *rest = loader.lora_state_dict(str(file), **options)
    alphas, facts = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0])
    if component.startswith("text_encoder"):
        loader.load_lora_into_text_encoder(
            state, alphas, twin, metadata=facts, prefix=component, adapter_name="default"
        )
    elif component == "unet":
        loader.load_lora_into_unet(state, network_alphas=alphas, unet=twin, adapter_name="default", metadata=facts)
    else:
        loader.load_lora_into_transformer(state, transformer=twin, adapter_name="default", metadata=facts)

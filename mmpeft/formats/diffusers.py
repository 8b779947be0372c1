"""Single LoRA files in diffusers' PEFT layout, as they are written.

`unet.<path>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`; alpha in the metadata `lora_adapter_metadata`.
They carry their scale in the tensors (alpha = r): every tool agrees on them, whether or not it reads the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.formats.content import Content, Layer, dump_tensors
from mmpeft.formats.kohya import is_t5
from mmpeft.formats.peft import exact_targets, lora_fields, lora_tensors
from mmpeft.formats.single_file import METADATA
from mmpeft.types import Json

WEIGHTS = "pytorch_lora_weights.safetensors"


def in_files(content: Content, component: str, model: nn.Module | None) -> Content:
    """What is for one model of a pipeline by the paths that files have: those of CLIP's text models with `text_model`.

    Raises:
        Refused: diffusers reads nothing for such a model.
    """
    t5 = component == "text_encoder_3" or (model is not None and is_t5(model))
    if t5 and content.format == "diffusers":
        raise Refused(
            f"diffusers reads no layers of a {component} that is a T5, and would leave them out without a word; "
            "format='kohya' has names for them, which ComfyUI and sd-scripts read"
        )
    prefix = "text_model." if component.startswith("text_encoder") and not t5 else ""

    def named(path: str) -> str:
        return path if path.startswith(prefix) else prefix + path

    layers = [replace(x, component=component, path=named(x.path)) for x in content.layers]
    return replace(
        content,
        layers=layers,
        shifts=[replace(x, component=component, path=named(x.path)) for x in content.shifts],
    )


def diffusers_bytes(layers: Collection[Layer], component: str, modules: Collection[str] = ()) -> bytes:
    """A `pytorch_lora_weights.safetensors` with the least metadata that every diffusers accepts."""
    baked = {c: [x.baked() for x in layers if (x.component or component) == c] for c in _components(layers, component)}
    tensors: dict[str, Tensor] = {}
    packed: Json = {}
    for name, own in baked.items():
        tensors |= lora_tensors(own, f"{name}.")
        bare = [replace(layer, path=layer.path.removeprefix("text_model.")) for layer in own]  # names that end both
        fields = lora_fields(bare) | {"target_modules": exact_targets([layer.path for layer in bare], modules)}
        if bare[0].path != own[0].path:
            for key in ("rank_pattern", "alpha_pattern"):
                fields[key] = {path.removeprefix("^"): value for path, value in fields[key].items()}
        packed |= {f"{name}.{key}": value for key, value in fields.items()}
    return dump_tensors(tensors, {"format": "pt", METADATA: json.dumps(packed, sort_keys=True)})


def _components(layers: Collection[Layer], component: str) -> list[str]:
    return sorted({layer.component or component for layer in layers})

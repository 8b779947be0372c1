"""What files call the models of a pipeline and their modules, and the modules of a model that they mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from mmpeft.errors import AdapterFileError
from mmpeft.formats import hub, lycoris, mlx, original
from mmpeft.formats.based import on_base
from mmpeft.formats.content import Based, Content, Layer, Shift
from mmpeft.formats.kohya import is_t5
from mmpeft.hosting.modules import CHILD

FLAT = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lycoris_": "",
}
"""Beginnings of names whose dots are underscores → component."""
DOTTED = {name: name for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
DOTTED |= {"diffusion_model": ""}
DENOISERS = ("", "unet", "transformer")
"""What files call the denoiser, whatever the pipeline calls it."""
ORIGINAL = ("input_blocks", "middle_block", "output_blocks", "double_blocks", "single_blocks", "joint_blocks")
"""First modules of the original code bases, which diffusers has none of."""

UNETS = ("down_blocks", "mid_block", "up_blocks", "conv_", "time_embedding", "add_embedding", "class_embedding")
"""First modules of diffusers' UNets."""

Named = TypeVar("Named", Layer, Shift, Based)


def placed(name: str) -> tuple[str, str, bool]:
    """(component, path, flat) of the name before a key's slot."""
    for prefix, component in FLAT.items():
        if name.startswith(prefix):
            path = name.removeprefix(prefix)
            return component, path, "_" in path
    first, _, rest = name.partition(".")
    return (DOTTED[first], rest, False) if first in DOTTED and rest else ("", name, False)


def is_original(path: str) -> bool:
    """Whether a module is called as in an original code base."""
    return path.startswith(ORIGINAL)


def is_unets(path: str) -> bool:
    """Whether a module is called as in a UNet of diffusers, which is what files mean that name no model."""
    return path.startswith(UNETS)


def resolved(content: Content, model: nn.Module | None, where: object) -> Content:
    """A file's content by the model's own module paths; what matches none keeps its name.

    Raises:
        AdapterFileError: names or values that only a model tells and no model, two modules of the same flat name, or
            tensors of another base.
    """
    if model is None:
        return _alone(content, where)
    if content.format == "mlx":
        return mlx.named(content, model, where)
    if content.format == "adapterhub":
        return hub.named(content, model, where)
    names = _Names(model, where)
    found: list[Layer | Shift] = [on_base(x, names.weight(x), where) for x in content.based]
    layers = original.split([*content.layers, *(x for x in found if isinstance(x, Layer))], model, where)
    shifts = original.split_shifts([*content.shifts, *(x for x in found if isinstance(x, Shift))], model, where)
    return replace(
        content,
        layers=[lycoris.shaped(names.of(layer), model) for layer in layers],
        shifts=[names.of(shift) for shift in shifts],
        based=[],
    )


def _alone(content: Content, where: object) -> Content:
    """The content as it is, if names and values can be read without a model."""
    if content.format in ("mlx", "adapterhub"):
        raise AdapterFileError(
            f"{where}: which modules its names mean, and which of them are tables, only a model tells; give it"
        )
    flat = next((x for x in content.named if x.flat), None)
    if flat is not None:
        raise AdapterFileError(
            f"{where}: the name {flat.path!r} does not say which underscores are dots, or a flat kernel how it was "
            "folded; give the model whose modules it names"
        )
    if content.based:
        raise AdapterFileError(
            f"{where}: {content.based[0].path} is {content.based[0].kind}, which changes the base by the base's own "
            "values; give the model"
        )
    return content


class _Names:
    """The modules of a model by what files call them."""

    def __init__(self, model: nn.Module, where: object) -> None:
        self.model, self.where = model, where
        self.table = {name.replace(".", "_"): paths for name, paths in original.table_of(model).items()}
        self.flats: dict[str, list[str]] = {}
        for name, _ in model.named_modules():
            if CHILD not in name.split("."):
                self.flats.setdefault(name.replace(".", "_"), []).append(name)

    def of(self, item: Named) -> Named:
        """The item by the path of the module that it means."""
        flat = item.path.replace(".", "_")
        found, bare = self.flats.get(flat, []), flat.removeprefix("text_model_")
        if not found and bare in self.flats:  # CLIP's text models have lost their inner `text_model`, files keep it
            return replace(item, path=self.flats[bare][0], flat=False)
        if item.flat:
            if len(found) > 1:
                raise AdapterFileError(f"{self.where}: {item.path!r} names {len(found)} modules: {' and '.join(found)}")
            if not found and is_original(item.path):
                raise AdapterFileError(
                    f"{self.where}: {item.path!r} is a name of an original code base, and no module of this "
                    f"{type(self.model).__name__.removeprefix('Tuned')} is called so there; load the base that the "
                    "adapter was made for"
                )
            return replace(item, path=found[0], flat=False) if found else item
        inner = f"{item.component}.{item.path}"  # a model whose own first module is called `transformer`
        if item.path not in found and inner in self.flats.get(inner.replace(".", "_"), []):
            return replace(item, path=inner, component="")
        return item

    def weight(self, item: Based) -> torch.Tensor:
        """The base's weight that an update is of; of a fused one the parts together."""
        paths = self.table.get(item.path.replace(".", "_"), ())
        if not paths:
            path = self.of(item).path
            paths = (path,) if path in self.flats.get(path.replace(".", "_"), []) else ()
        if not paths:
            name = type(self.model).__name__.removeprefix("Tuned")
            raise AdapterFileError(
                f"{self.where}: {name} has no module {item.path!r}; load the base that the adapter was made for"
            )
        return original.together(self.model, paths)


def resolve(layers: Sequence[Layer], model: nn.Module | None, where: object) -> list[Layer]:
    """`resolved` for layers alone."""
    return resolved(Content("", list(layers)), model, where).layers


def component_for(model: nn.Module) -> str:
    """What a pipeline calls a model of this class: `unet`, `transformer` or `text_encoder`."""
    name = type(model).__name__.removeprefix("Tuned")
    if "UNet" in name:
        return "unet"
    return "text_encoder" if "Text" in name else "transformer"


def aliases_of(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Other names that files have for a pipeline's models: its T5 is the third text encoder in kohya's."""
    t5 = [name for name, model in models.items() if is_t5(model)]
    return {"text_encoder_3": t5[-1]} if t5 else {}


def assigned(content: Content, names: Collection[str], aliases: Mapping[str, str], where: object) -> dict[str, str]:
    """The file's components → the models of a pipeline that they are for, by the pipeline's `names` of them.

    `aliases` are other names that files have for some: the T5 of Flux is the third text encoder of kohya's files.

    Raises:
        AdapterFileError: layers that are for none of the models.
    """
    denoiser = next((name for name in names if name in DENOISERS), "")
    found: dict[str, str] = {}
    for component, count in content.components.items():
        if component in names:
            found[component] = component
        elif aliases.get(component) in names:
            found[component] = aliases[component]
        elif component in DENOISERS and denoiser:
            found[component] = denoiser
        else:
            first = next(x.path for x in content.named if x.component == component)
            raise AdapterFileError(
                f"{where}: {count} of its {sum(content.components.values())} layers are of {component or 'no model'!r} "
                f"(first {first}), and this pipeline tunes {', '.join(names)} only; it is for another pipeline"
            )
    return found

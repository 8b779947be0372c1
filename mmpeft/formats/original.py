"""The names that the original repositories give to the modules of Flux and SD3, as ComfyUI reads them.

    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight      to_q, to_k and to_v of diffusers in one

Fused projections stack: `A` of the whole is `[A_q; A_k; A_v]` (once where they are the same), `B` is block-diagonal.
The last modulation has its halves, shift and scale, the other way round. The tables are those of diffusers' own
converters of single-file checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats import ldm
from mmpeft.formats.content import Layer, Shift, dump_tensors
from mmpeft.hosting.host import base_value, original_class
from mmpeft.hosting.modules import CHILD, module_at

PREFIX = "diffusion_model."
TENSORS: tuple[Literal["weight", "bias"], ...] = ("weight", "bias")
_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_TIME, _POOLED = "time_text_embed.timestep_embedder", "time_text_embed.text_embedder"
_GUIDANCE = "time_text_embed.guidance_embedder"

_FLUX: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_attn.qkv": _QKV,
            "txt_attn.qkv": _ADDED,
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {"linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
    ),
    "": (
        "",
        {
            "img_in": ("x_embedder",),
            "txt_in": ("context_embedder",),
            "time_in.in_layer": (f"{_TIME}.linear_1",),
            "time_in.out_layer": (f"{_TIME}.linear_2",),
            "vector_in.in_layer": (f"{_POOLED}.linear_1",),
            "vector_in.out_layer": (f"{_POOLED}.linear_2",),
            "guidance_in.in_layer": (f"{_GUIDANCE}.linear_1",),
            "guidance_in.out_layer": (f"{_GUIDANCE}.linear_2",),
            "final_layer.linear": ("proj_out",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        },
    ),
}
_SD3: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "joint_blocks": (
        "transformer_blocks",
        {
            "x_block.attn.qkv": _QKV,
            "context_block.attn.qkv": _ADDED,
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "context_block.attn.proj": ("attn.to_add_out",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        },
    ),
    "": (
        "",
        {
            "x_embedder.proj": ("pos_embed.proj",),
            "context_embedder": ("context_embedder",),
            "t_embedder.mlp.0": (f"{_TIME}.linear_1",),
            "t_embedder.mlp.2": (f"{_TIME}.linear_2",),
            "y_embedder.mlp.0": (f"{_POOLED}.linear_1",),
            "y_embedder.mlp.2": (f"{_POOLED}.linear_2",),
            "final_layer.linear": ("proj_out",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        },
    ),
}
TABLES = {"FluxTransformer2DModel": _FLUX, "SD3Transformer2DModel": _SD3}


def table_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Original name → the modules of this model that it is made of, in the order of their rows; empty if unknown."""
    found: dict[str, tuple[str, ...]] = {}
    if original_class(model).__name__ == "UNet2DConditionModel":
        unet = {name: module for name, module in model.named_modules() if CHILD not in name.split(".")}
        return {name: (path,) for name, path in ldm.names_of(unet).items()}
    for theirs, (ours, names) in TABLES.get(original_class(model).__name__, {}).items():
        count = len(model.get_submodule(ours)._modules) if ours else 1
        for i in range(count):
            before, own = (f"{theirs}.{i}.", f"{ours}.{i}.") if ours else ("", "")
            found |= {before + name: tuple(own + path for path in paths) for name, paths in names.items()}
    modules = {name for name, _ in model.named_modules()}
    return {name: paths for name, paths in found.items() if set(paths) <= modules}


def together(model: nn.Module, paths: tuple[str, ...]) -> Tensor:
    """The weights of modules as the original has them in one."""
    weights = [base_value(module_at(model, path), "weight") for path in paths]
    if len(paths) == 1 and _turned(model, paths[0]):
        return _swap(weights[0])
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _turned(model: nn.Module, path: str) -> bool:
    """Whether a module has scale and shift where the original has shift and scale: its norm has no gate and no MLP."""
    owner = module_at(model, path.rpartition(".")[0])
    return original_class(owner).__name__ == "AdaLayerNormContinuous"


def _swap(rows: Tensor) -> Tensor:
    one, two = rows.chunk(2)
    return torch.cat([two, one])


def fused(layers: Sequence[Layer], model: nn.Module) -> list[Layer]:
    """Layers by the original names.

    Raises:
        Refused: no such names are known, or a DoRA layer is only a part of a fused one.
    """
    table = table_of(model)
    if not table:
        raise Refused(
            f"the original names of {original_class(model).__name__} are not known; ComfyUI reads UNets from the kohya "
            "format and other transformers from the diffusers format"
        )
    owner = {path: name for name, paths in table.items() for path in paths}
    strange = next((layer.path for layer in layers if layer.path not in owner), "")
    if strange:
        raise Refused(f"{strange} has no one module in the original repository that diffusers' converter names")
    own = {layer.path: layer.baked() for layer in layers}
    return [_fuse(name, paths, own, model) for name, paths in table.items() if set(paths) & set(own)]


def _fuse(name: str, paths: tuple[str, ...], own: dict[str, Layer], model: nn.Module) -> Layer:
    if len(paths) == 1:
        only = own[paths[0]]
        if _turned(model, only.path):
            only = replace(only, up=_swap(only.up), magnitude=None if only.magnitude is None else _swap(only.magnitude))
        return replace(only, path=name, component="")
    given = [own[path] for path in paths if path in own]
    lengths: list[Tensor] = []
    if any(layer.magnitude is not None for layer in given):  # the others keep the length that they have
        lengths = [_lengths(model, path, own.get(path)) for path in paths]
    downs: list[Tensor] = []
    columns: dict[str, slice] = {}
    for layer in given:
        same = next((p for p in columns if torch.equal(own[p].down, layer.down)), "")
        start = sum(map(len, downs))
        columns[layer.path] = columns[same] if same else slice(start, start + layer.rank)
        downs += [] if same else [layer.down]
    down = torch.cat(downs)
    blocks = []
    for path in paths:
        rows = down.new_zeros(len(base_value(module_at(model, path), "weight")), len(down))
        if path in own:
            rows[:, columns[path]] = own[path].up.to(rows)
        blocks.append(rows)
    return Layer(name, down, torch.cat(blocks), float(len(down)), torch.cat(lengths) if lengths else None)


def _lengths(model: nn.Module, path: str, layer: Layer | None) -> Tensor:
    if layer is not None and layer.magnitude is not None:
        return layer.magnitude.detach().float()
    weight: Tensor = base_value(module_at(model, path), "weight").detach().float().flatten(1)
    if layer is not None:
        weight = weight + (layer.up.float() @ layer.down.float().flatten(1)).to(weight) * layer.scale
    found: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return found


def split(layers: Sequence[Layer], model: nn.Module, where: object) -> list[Layer]:
    """Layers of original names, dotted or flat, by the model's own; others stay as they are.

    Raises:
        AdapterFileError: other rows than those of the model's modules together.
    """
    modules = {name for name, _ in model.named_modules()}
    table = {name.replace(".", "_"): paths for name, paths in table_of(model).items()}
    found: list[Layer] = []
    for layer in layers:
        paths = table.get(layer.path.replace(".", "_"), ())
        found += _split(layer, paths, model, where) if paths and layer.path not in modules else [layer]
    return found


def _split(layer: Layer, paths: tuple[str, ...], model: nn.Module, where: object) -> list[Layer]:
    sizes = [len(base_value(module_at(model, path), "weight")) for path in paths]
    if sum(sizes) != len(layer.up):
        raise AdapterFileError(
            f"{where}: {layer.path} has {len(layer.up)} rows, {' and '.join(paths)} together have {sum(sizes)}; the "
            "adapter was made for another base"
        )
    turned = len(paths) == 1 and _turned(model, paths[0])
    ups = [_swap(layer.up)] if turned else layer.up.split(sizes)
    lengths = [None] * len(paths) if layer.magnitude is None else list(layer.magnitude.split(sizes))
    if turned and layer.magnitude is not None:
        lengths = [_swap(layer.magnitude)]
    pieces = []
    for path, up, length in zip(paths, ups, lengths):
        keep = (up != 0).any(0)
        if not keep.any():
            resting = length is None or torch.allclose(length.float(), _lengths(model, path, None), rtol=1e-6, atol=0)
            if resting and len(paths) > 1 and (layer.up != 0).any():
                continue
            keep[:] = True
        alpha = None if layer.alpha is None else layer.alpha * int(keep.sum()) / layer.rank
        piece = replace(layer, path=path, down=layer.down[keep], up=up[:, keep], alpha=alpha, magnitude=length)
        pieces.append(replace(piece, flat=False))
    return pieces


def split_shifts(shifts: Sequence[Shift], model: nn.Module, where: object) -> list[Shift]:
    """Differences of original names by the model's own, as `split` does for layers."""
    modules = {name for name, _ in model.named_modules()}
    table = {name.replace(".", "_"): paths for name, paths in table_of(model).items()}
    found: list[Shift] = []
    for shift in shifts:
        paths = table.get(shift.path.replace(".", "_"), ())
        if not paths or shift.path in modules:
            found.append(shift)
            continue
        sizes = [len(base_value(module_at(model, path), "weight")) for path in paths]
        if sum(sizes) != len(shift.value):
            raise AdapterFileError(
                f"{where}: {shift.path} has {len(shift.value)} values, {' and '.join(paths)} together have "
                f"{sum(sizes)}; the adapter was made for another base"
            )
        turned = len(paths) == 1 and _turned(model, paths[0])
        values = [_swap(shift.value)] if turned else shift.value.split(sizes)
        found += [replace(shift, path=path, value=value, flat=False) for path, value in zip(paths, values)]
    return found


def fused_shifts(shifts: Sequence[Shift], model: nn.Module) -> list[Shift]:
    """Differences by the original names, those of fused modules as one.

    Raises:
        Refused: a module that has no such name, or a norm, which has other names there.
    """
    table = table_of(model)
    own = {(shift.path, shift.tensor): shift for shift in shifts}
    owner = {path: name for name, paths in table.items() for path in paths}
    strange = next((x for x in shifts if x.path not in owner), None)
    if strange is not None:
        raise Refused(f"{strange.path}.{strange.tensor} has no one place in the original repository; use tuning.save()")
    found: list[Shift] = []
    for name, paths in table.items():
        for tensor in TENSORS:
            if not any((path, tensor) in own for path in paths):
                continue
            rows = [len(base_value(module_at(model, path), "weight")) for path in paths]
            values = [own[p, tensor].value if (p, tensor) in own else torch.zeros(n) for p, n in zip(paths, rows)]
            value = torch.cat([v.float().cpu() for v in values])
            value = _swap(value) if len(paths) == 1 and _turned(model, paths[0]) else value
            found.append(Shift(name, tensor, value))
    return found


def comfy_bytes(
    layers: Collection[Layer], model: nn.Module, shifts: Sequence[Shift] = (), marks: Mapping[str, str] | None = None
) -> bytes:
    """A file that ComfyUI reads; the scale is in `lora_B`, as it takes 1 where there is no alpha."""
    tensors: dict[str, Tensor] = {}
    for shift in fused_shifts(shifts, model) if shifts else ():
        tensors[f"{PREFIX}{shift.path}.{'diff' if shift.tensor == 'weight' else 'diff_b'}"] = shift.value
    for layer in fused(list(layers), model):
        ones = [1] * (layer.down.dim() - 2)
        name = PREFIX + layer.path
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = layer.up.reshape(*layer.up.shape, *ones)
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = layer.magnitude.view(-1, 1, *ones)
    return dump_tensors(tensors, {"format": "pt", **(marks or {})})

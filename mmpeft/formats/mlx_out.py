"""MLX folders as they are written: one rank, one scale, and which modules of the last blocks have an update."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.formats.content import Content, dump_tensors
from mmpeft.formats.low_rank import tunable_sites
from mmpeft.formats.mlx import CONFIG, WEIGHTS
from mmpeft.formats.tensors import names_of_one
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import CHILD, module_at
from mmpeft.types import Json

RENAMED: dict[str, dict[str, str]] = {
    "gpt2": {"transformer.": "model."},
    "gptj": {"transformer.": "model."},
}
"""`model_type` → beginnings of names in transformers and in `mlx_lm`, where they differ."""


UNTRIED = ("gpt_neox", "nemotron_h", "gemma3", "gemma4", "mistral3")
"""`model_type`s whose modules have other names in `mlx_lm`, and whose answers nobody has compared."""


def folder_files(content: Content, model: nn.Module) -> dict[str, bytes]:
    """Names and bytes of the two files of a folder for `mlx_lm`.

    Raises:
        Refused: what its readers have no place for.
    """
    content.check("the tuning")
    modules = {name for name, _ in model.named_modules() if CHILD not in name.split(".")}
    _check(content, model)
    if content.layers:
        paths = [layer.path for layer in content.layers]
        keys, count = _targets(paths, modules, model)
        layers = [layer.baked() for layer in content.layers]
        rank = max(layer.rank for layer in layers)
        tensors: dict[str, Tensor] = {}
        for layer in (layer.padded(rank) for layer in layers):
            name = renamed(layer.path, model)
            tensors |= {f"{name}.lora_a": layer.down.mT, f"{name}.lora_b": layer.up.mT}
            if layer.magnitude is not None:
                tensors[f"{name}.m"] = layer.magnitude
        kind = "lora" if content.layers[0].magnitude is None else "dora"
        parameters: Json = {"rank": rank, "scale": 1.0, "dropout": content.dropout, "keys": keys}
        fields: Json = {"fine_tune_type": kind, "num_layers": count, "lora_parameters": parameters}
    else:
        tensors = _whole(content, model)
        count = _targets([name.rpartition(".")[0] for name in content.tensors()], modules, model)[1]
        fields = {"fine_tune_type": "full", "num_layers": count, "lora_parameters": None}
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    text = json.dumps({"model": base or None, **fields}, indent=2, sort_keys=True) + "\n"
    return {WEIGHTS: dump_tensors(tensors, {"format": "mlx"}), CONFIG: text.encode()}


def _check(content: Content, model: nn.Module) -> None:
    held = "shifts of biases" * bool(content.shifts) or "rows of tables" * bool(content.words)
    if held or content.scalings or content.stacks or content.learned:
        kind = held or ("updates of experts" if content.stacks else content.method)
        raise Refused(f"an MLX folder has no place for {kind}; use tuning.save(), or merge")
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind in UNTRIED:
        raise Refused(
            f"mlx_lm has other names for the modules of a {kind}, which were not tried. Use tuning.save(), or merge"
        )
    if content.layers and content.tensors():
        raise Refused(
            f"there are updates and {content.beside}; mlx_lm reads one of them (fine_tune_type). Use tuning.save(), or "
            "merge"
        )
    lengths = sum(layer.magnitude is not None for layer in content.layers)
    if 0 < lengths < len(content.layers):
        raise Refused("there are both LoRA and DoRA layers; an MLX folder holds one of them. Use tuning.save()")
    shared = {name: names for names in names_of_one(model).values() for name in names}
    for layer in content.layers:
        if layer.down.dim() > 2:
            raise Refused(f"{layer.path} is a convolution, of which mlx_lm has no update. Use tuning.save(), or merge")
        if layer.lookup and layer.magnitude is not None:
            raise Refused(f"{layer.path} is a table with DoRA, whose lengths mlx_lm takes by word. Use LoRA there")
        names = shared[f"{layer.path}.weight"]
        if len(names) > 1:
            raise Refused(
                f"{layer.path} has its weight in common with {next(n for n in names if n != f'{layer.path}.weight')}; "
                "mlx_lm has one module for both, and would change both. Use tuning.save(), or merge"
            )


def renamed(path: str, model: nn.Module) -> str:
    """What `mlx_lm` calls a module or a tensor."""
    table = RENAMED.get(getattr(getattr(model, "config", None), "model_type", ""), {})
    found = next((before for before in table if path.startswith(before)), "")
    return table[found] + path.removeprefix(found) if found else path


def _block(path: str) -> tuple[str, int, str]:
    """The list that a module is in, its place there, and its name from there; no list and -1 outside one."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    if number < 0:
        return "", -1, path
    return ".".join(parts[:number]), int(parts[number]), ".".join(parts[number + 1 :])


def _targets(paths: Sequence[str], modules: Collection[str], model: nn.Module) -> tuple[list[str], int]:
    """`keys` and `num_layers` that make mlx_lm update these modules and no other.

    Names within a block hold for the last `num_layers` blocks; where those have more modules of that name than are
    updated, or others have some too, modules are named in full.
    """
    placed = [_block(path) for path in paths]
    lists = {list_ for list_, number, _ in placed if number >= 0}
    inside = [(number, own) for _, number, own in placed if number >= 0]
    everything = sorted(renamed(path, model) for path in paths)
    if len(lists) != 1:
        return everything, 1
    (blocks,) = lists
    total = 1 + max(number for list_, number, _ in map(_block, modules) if list_ == blocks)
    first, keys = min(number for number, _ in inside), {own for _, own in inside}
    meant = {(i, own) for i in range(first, total) for own in keys if f"{blocks}.{i}.{own}" in modules}
    if meant != set(inside):
        return everything, total - first
    return sorted(keys) + sorted(renamed(p, model) for p in paths if _block(p)[1] < 0), total - first


def _whole(content: Content, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the base by mlx_lm's names: one of each, weights of linears as [o, i]."""
    turned = {path for path, own in tunable_sites(model, ("linear",)).items() if own[0].transposed}
    first = {names[0] for names in names_of_one(model).values()}
    found = {}
    for name, tensor in content.tensors().items():
        path, _, own = name.rpartition(".")
        if base_value(module_at(model, path), own).dim() > 2:
            raise Refused(
                f"{name} is {list(tensor.shape)}, which mlx_lm keeps in another order. Merge, and convert that"
            )
        if name in first:
            found[renamed(name, model)] = tensor.mT if own == "weight" and path in turned else tensor
    return found

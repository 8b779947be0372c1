"""Hugging Face PEFT folders as they are written: one rank, one scale, lists of names.

PEFT reads patterns of ranks and regular expressions; llama.cpp divides a folder's one alpha by each tensor's rank, and
SGLang knows neither. So updates of several ranks are padded with zeros to the largest, and scales are in the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.formats import peft_experts, peft_others, peft_prompts
from mmpeft.formats.content import Content
from mmpeft.formats.peft import LENGTHS_FOR_ALL, PREFIX, SHIFT, exact_targets, folder_of, lora_tensors
from mmpeft.formats.peft_experts import StackTensors
from mmpeft.hosting.host import original_class
from mmpeft.types import Json


def base_fields(model: nn.Module) -> Json:
    """What a config says of its base: where it was read, and the class that PEFT's and transformers' loaders build."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    kind = original_class(model)
    library = kind.__module__ if kind.__module__.startswith("transformers.") else ""
    mapping = {"base_model_class": kind.__name__, "parent_library": library} if library else None
    return {"base_model_name_or_path": name or None, "auto_mapping": mapping}


VLLM_RANK = 16
"""The largest rank that vLLM takes unless it is told more."""


def limits(content: Content, model: nn.Module) -> list[str]:
    """What servers of language models, which read PEFT folders too, make of this one; nothing for other models."""
    if not hasattr(model, "generate"):
        return []
    found = []
    beyond = {
        "DoRA": any(layer.magnitude is not None for layer in content.layers),
        content.beside: bool(content.beside),
        "biases inside updates": bool(content.shifts),
        "updates of experts": content.stacks is not None,
        "learned tokens": content.learned is not None,
    }
    named = [name for name, there in beyond.items() if there]
    if named:
        found.append(
            f"{' and '.join(named)}: PEFT and transformers read that; vLLM refuses it, SGLang reads low-rank updates "
            "alone without a word, llama.cpp refuses it or leaves norms out: merge for those"
        )
    rank = max((layer.rank for layer in content.layers), default=0)
    if rank > VLLM_RANK:
        found.append(f"rank {rank}: vLLM takes it with --max-lora-rank {next(n for n in (*SIZES, rank) if n >= rank)}")
    return found


SIZES = (32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can be told."""


def folder_files(content: Content, modules: Collection[str] = (), base: Json | None = None) -> dict[str, bytes]:
    """Names and bytes of the two files of a PEFT folder.

    `modules` are the module names of the base, where they are known; they decide whether a plain list of targets
    is exact (PEFT takes every module whose path ends with a target).

    Raises:
        Refused: LoRA and DoRA layers; the config has one switch for all.
    """
    if 0 < sum(layer.magnitude is not None for layer in content.layers) < len(content.layers):
        raise Refused("there are both LoRA and DoRA layers; a PEFT folder holds one of them. Use tuning.save()")
    if content.learned is not None:
        tensors = {f"{peft_prompts.WRAPPED}{m}.{n}": t for m, own in content.whole.items() for n, t in own.items()}
        tensors[peft_prompts.KEY] = content.learned.tensor
        fields: Json = {**peft_prompts.fields(content.learned), "auto_mapping": None}  # the task says the class
    else:
        kind = "IA3" if content.scalings else "LORA" if content.layers or content.stacks else ""
        fields, tensors = WRITERS[kind](content, modules)
    return folder_of(tensors, {"modules_to_save": sorted(content.whole) or None, **fields}, base)


Written = tuple[Json, dict[str, Tensor]]
"""Fields of the config, and tensors."""


def _lora(content: Content, modules: Collection[str]) -> Written:
    layers = [layer.baked() for layer in content.layers]
    rank = max([*(layer.rank for layer in layers), *(_ranks(content.stacks).values())])
    layers = [layer.padded(rank) for layer in layers]
    tensors = lora_tensors(layers, PREFIX, LENGTHS_FOR_ALL) | beside(content, {layer.path for layer in layers})
    if content.shifts:
        biases = {shift.path: shift.value for shift in content.shifts}
        linears = [layer for layer in layers if not layer.lookup]
        tensors |= {f"{PREFIX}{x.path}{SHIFT}": biases.get(x.path, x.up.new_zeros(len(x.up))) for x in linears}
    config: Json = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": any(layer.magnitude is not None for layer in layers),
        "init_lora_weights": True,
        "lora_dropout": content.dropout if content.stacks is None else 0.0,  # PEFT has none beside bare parameters
        "lora_bias": bool(content.shifts),
        "bias": "all" if any(name.endswith("bias") for name in content.base) else "none",
        "fan_in_fan_out": any(layer.transposed for layer in layers if not layer.lookup),
        "target_modules": exact_targets([layer.path for layer in layers], modules),
    }
    if content.words:
        config[peft_others.OPTION] = {path: list(indices) for path, (indices, _) in content.words.items()}
        for path, (_, rows) in content.words.items():
            tensors[f"{PREFIX}{path}.token_adapter{peft_others.ROWS}"] = rows
    if content.stacks is not None:
        config[peft_experts.OPTION] = content.stacks.config[peft_experts.OPTION]
        padded = peft_experts.padded(content.stacks, rank)
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in padded.tensors().items()}
    return config, tensors


def _ranks(stacks: StackTensors | None) -> Mapping[str, int]:
    return stacks.config["ranks"] if stacks else {}


def _ia3(content: Content, modules: Collection[str]) -> Written:
    inputs = [scaling.path for scaling in content.scalings if scaling.side == "input"]
    tensors = beside(content, {scaling.path for scaling in content.scalings})
    for scaling in content.scalings:
        gamma = scaling.gamma[None] if scaling.side == "input" else scaling.gamma[:, None]
        tensors[f"{PREFIX}{scaling.path}.ia3_l"] = gamma
    return {
        "peft_type": "IA3",
        "fan_in_fan_out": any(scaling.transposed for scaling in content.scalings),
        "feedforward_modules": exact_targets(inputs, modules) if inputs else [],
        "target_modules": exact_targets([scaling.path for scaling in content.scalings], modules),
    }, tensors


def _alone(content: Content, modules: Collection[str]) -> Written:
    """Tensors of the base alone: PEFT's LN_TUNING keeps a copy of any module; rows have a type of their own.

    Raises:
        Refused: both, or rows of more than one table.
    """
    if content.words:
        if len(content.words) > 1 or content.base or content.whole:
            raise Refused("PEFT has rows of one table, or rows beside a low-rank update; use tuning.save()")
        ((path, (indices, rows)),) = content.words.items()
        known: Json = {"peft_type": peft_others.WORDS, "token_indices": list(indices), "target_modules": [path]}
        return known, {f"{PREFIX}{path}{peft_others.ROWS}": rows}
    owners: dict[str, dict[str, Tensor]] = {}
    for name, tensor in content.tensors().items():
        path, _, own = name.rpartition(".")
        owners.setdefault(path, {})[own] = tensor
    if "" in owners:
        raise Refused(f"{min(owners[''])} belongs to the model itself, of which PEFT keeps no copy; use tuning.save()")
    tensors = {f"{PREFIX}{m}{peft_others.NORM}{n}": t for m, own in owners.items() for n, t in own.items()}
    targets = exact_targets(list(owners), modules)
    return {"peft_type": peft_others.NORMS, "target_modules": targets, "modules_to_save": None}, tensors


def beside(content: Content, adapted: Collection[str]) -> dict[str, Tensor]:
    """Whole modules and tensors of the base, under the names they have beside an update."""
    found = {f"{PREFIX}{m}.{n}": tensor for m, own in content.whole.items() for n, tensor in own.items()}
    for name, tensor in content.base.items():
        path, _, own = name.rpartition(".")
        found[f"{PREFIX}{path}.base_layer.{own}" if path in adapted else f"{PREFIX}{name}"] = tensor
    return found


WRITERS: dict[str, Callable[[Content, Collection[str]], Written]] = {"LORA": _lora, "IA3": _ia3, "": _alone}

"""A written adapter, reloaded by the program that will read it and compared tensor by tensor."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError
from mmpeft.formats.content import Content
from mmpeft.formats.hub import of_branches
from mmpeft.formats.low_rank import delta_weights
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.attaching import detach
from mmpeft.surgery.state import state_of
from mmpeft.types import AnyModule

TOLERANCE = 1e-5
"""Largest difference of a reloaded tensor, relative to its largest value; a reader in half precision may round."""

ANSWERS = 1e-4
"""Largest difference of an answer, relative to its largest value: two kernels may add up in another order."""

REFUSALS = (ValueError, KeyError, TypeError, RuntimeError, AttributeError)
"""What readers raise on a file they do not understand."""


@dataclass(frozen=True)
class Check:
    """Who read a file back, how many modules it found there, and how far they are from what was written."""

    reader: str
    modules: int
    difference: float


def plain_copy(model: nn.Module) -> nn.Module:
    """The base without its tunings as another module tree over the same storage; the model is left alone."""
    shared: dict[int, object] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        shared[id(buffer)] = buffer
    twin = copy.deepcopy(model, shared)
    state = state_of(twin)
    for name in list(state.placements) if state else ():
        detach(twin, name)
    return twin


def expected(content: Content) -> dict[str, Tensor]:
    """What a reader must have: ΔW by module, magnitudes, scalings and whole tensors, each by a key of its own."""
    found: dict[str, Tensor] = {}
    for layer in content.layers:
        name = f"{layer.component}:{layer.path}".lstrip(":")
        found[f"ΔW of {name}"] = delta_weights([replace(layer, magnitude=None)])[layer.path]
        if layer.magnitude is not None:
            found[f"magnitude of {name}"] = layer.magnitude
    found |= {f"difference of {x.path}.{x.tensor}": x.value for x in content.shifts if x.value.any()}
    if content.stacks is not None:
        found |= {f"{name} of experts": tensor for name, tensor in content.stacks.tensors().items()}
    if content.learned is not None:
        found["learned tokens"] = content.learned.tensor
    found |= content.tensors() | of_branches(content)
    found |= {f"rows of {path}": tensor for path, (_, tensor) in content.words.items()}
    found |= {f"vector on {x.path}'s {x.side}": x.gamma for x in content.scalings}
    return found


def compare(reader: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Check:
    """Every tensor of both sides within the tolerance.

    Raises:
        AdapterFileError: nothing at all, other modules, or another value.
    """
    if not got:
        raise AdapterFileError(f"{reader} found no layer in the file that was written; nothing is kept")
    for names, what in ((set(wanted) - set(got), "does not find"), (set(got) - set(wanted), "also finds")):
        if names:
            raise AdapterFileError(
                f"{reader} {what} {len(names)} of the tensors written, first {min(names)!r}; nothing is kept"
            )
    worst = 0.0
    for name, tensor in wanted.items():
        kept = got[name].dtype
        limit = TOLERANCE if kept.itemsize > 2 else 4 * torch.finfo(kept).eps
        mine, theirs = tensor.detach().float().cpu(), got[name].detach().float().cpu()
        if mine.numel() != theirs.numel():
            raise AdapterFileError(f"{reader} reads {name} as {tuple(theirs.shape)}, written was {tuple(mine.shape)}")
        off = (mine.flatten() - theirs.flatten()).abs().max() / mine.abs().max().clamp_min(1e-12)
        worst = max(worst, float(off))
        if not off <= limit:
            raise AdapterFileError(
                f"{reader} reads {name} with a relative difference of {float(off):.1e}; at most {limit:.0e} is "
                "accepted, nothing is kept"
            )
    return Check(reader, len(wanted), worst)


def by_peft(model: nn.Module, folder: Path, content: Content) -> list[Check]:
    """Load a folder with `peft.PeftModel.from_pretrained`; empty where peft is not installed."""
    if find_spec("peft") is None:
        return []
    from peft import PeftModel

    reader = f"peft {version('peft')}"
    with quiet():
        try:
            loaded = PeftModel.from_pretrained(plain_copy(model), str(folder))
        except REFUSALS as error:
            raise AdapterFileError(f"{reader} refuses the folder that was written: {error}") from error
    base = loaded.get_base_model()
    wanted, got = expected(content), adapters(base, "default")
    return [compare(reader, wanted, got | _of_base(base, (name for name in content.tensors() if name not in got)))]


def _of_base(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that peft holds where the file has those of the base, under the keys of `expected`."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in names:
        path, _, own = name.rpartition(".")
        module: AnyModule = modules[path]
        while hasattr(module, "base_layer"):
            copies = getattr(module, "ln_tuning_layers", {})
            module = copies["default"] if len(copies) else module.base_layer
        found[name] = getattr(module, own)
    return found


@torch.no_grad()
def by_peft_answers(tuning: Attached, folder: Path, content: Content) -> list[Check]:
    """Load a folder of learned tokens with PEFT and compare its tensor, and its answers with the tuned model's.

    Answers, because PEFT has conventions of its own for where a text stands behind such tokens.
    """
    if find_spec("peft") is None:
        return []
    from peft import PeftModel

    assert content.learned is not None
    reader, model = f"peft {version('peft')}", tuning.model
    training = {module: module.training for module in model.modules()}
    ids = torch.arange(8, device=next(model.parameters()).device).view(2, 4) + 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids.flip(1)
    try:
        model.eval()
        with quiet(), tuning.use():
            try:
                loaded: AnyModule = PeftModel.from_pretrained(plain_copy(model), str(folder)).eval()
                theirs = loaded(**batch)
            except REFUSALS as error:
                raise AdapterFileError(f"{reader} refuses the folder that was written: {error}") from error
            ours = model(**batch)
    finally:
        for module, mode in training.items():
            module.training = mode
    check = compare(
        reader,
        {"learned tokens": content.learned.tensor},
        {"learned tokens": loaded.prompt_encoder["default"].embedding.weight},
    )
    name = next(n for n, value in ours.items() if isinstance(value, Tensor) and value.is_floating_point())
    mine, other = ours[name].float(), theirs[name].float()
    if other.dim() > 1:
        other = other[:, -mine.shape[1] :]
    off = float((mine - other).abs().max() / mine.abs().max().clamp_min(1e-12))
    limit = ANSWERS if ours[name].dtype.itemsize > 2 else 16 * torch.finfo(ours[name].dtype).eps
    if not off <= limit:
        raise AdapterFileError(
            f"{reader} answers with {name} at a relative difference of {off:.1e}; at most {limit:.0e} is accepted, "
            "nothing is kept"
        )
    return [Check(reader, check.modules, max(check.difference, off))]


def adapters(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter that peft holds in a model, under the keys of `expected`."""
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.lycoris_utils import LycorisLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper) and name in module.scaling:
            for half, own in (("A", module.lora_A[name]), ("B", module.lora_B[name])):
                found[f"{path}.lora_{half}.weight of experts"] = own.weight
        elif isinstance(module, LoraLayer) and name in module.scaling:
            delta = module.get_delta_weight(name)
            turned = getattr(module, "fan_in_fan_out", False) or name in module.lora_embedding_A
            found[f"ΔW of {path}"] = delta.T if turned else delta
            bias = getattr(module.lora_B[name], "bias", None) if name in module.lora_B else None
            if bias is not None and bias.any():
                found[f"difference of {path}.bias"] = bias * module.scaling[name]
            if name in module.lora_magnitude_vector:
                found[f"magnitude of {path}"] = module.lora_magnitude_vector[name].weight
        elif isinstance(module, LycorisLayer) and name in module.scaling:
            found[f"ΔW of {path}"] = module.get_delta_weight(name)
        elif isinstance(module, IA3Layer) and name in module.ia3_l:
            side = "input" if module.is_feedforward else "output"
            found[f"vector on {path}'s {side}"] = module.ia3_l[name]
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            own = module.modules_to_save[name].state_dict()
            found |= {f"{path}.{key}": tensor for key, tensor in own.items()}
        elif (
            isinstance(module, TrainableTokensLayer)
            and not module.tied_adapter
            and name in module.trainable_tokens_delta
        ):
            found[f"rows of {path.removesuffix('.token_adapter')}"] = module.trainable_tokens_delta[name]
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what loaders print: the comparison after them says all there is to say, and says it as an error."""
    noisy = [logging.getLogger(name) for name in ("diffusers", "diffusers.loaders.peft", "peft")]
    levels = [logger.level for logger in noisy]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        for logger in noisy:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(noisy, levels):
                logger.setLevel(level)

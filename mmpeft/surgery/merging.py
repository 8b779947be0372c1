"""A tuning folded into the base weights, and taken out of them again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmpeft.errors import ConfigError, Refused, StateError
from mmpeft.hosting.host import base_value, is_sharded
from mmpeft.hosting.modules import own_modules
from mmpeft.hosting.offload import check_writable
from mmpeft.hosting.quantized import QuantizedWeight
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.types import Leaf

if TYPE_CHECKING:
    from mmpeft.parts.base import Hook, Part
    from mmpeft.surgery.attached import Attached


@torch.no_grad()
def merge(tuning: Attached) -> None:
    """Fold a tuning into the base weights, in fp32; the originals are kept."""
    with unchanged_on_error(tuning.model):
        _fold(tuning)


def _fold(tuning: Attached) -> None:
    state = tuning._state
    check_whole(tuning)
    if tuning.name in state.merged:
        raise StateError(f"tuning {tuning.name!r} is merged already")
    folded: list[tuple[nn.Module, str, Tensor | None]] = []
    for path, hooks in _hooks_by_host(tuning).items():
        host = state.hosts[path]
        tuned = {hook.name if hook.kind == "read" else "weight" for hook, _ in hooks}
        names = tuned | {"weight", "bias"}
        computed = next((n for n in sorted(tuned) if parametrize.is_parametrized(host, n)), "")
        if computed:
            raise Refused(
                f"{path}.{computed} is computed by a parametrization (such as weight normalisation), so that nothing "
                "holds what a merge would change: torch.nn.utils.parametrize.remove_parametrizations first, then attach"
            )
        base = {n: base_value(host, n) for n in names if n in host._parameters or n in host._buffers}
        wide = {n: _wide(t) for n, t in base.items()}
        params: dict[str, Tensor | None] = dict(wide)
        for hook, part in hooks:
            part.fold(host, hook, params)
        for name, tensor in params.items():
            before = wide.get(name)
            if tensor is not before and isinstance(base.get(name), QuantizedWeight):
                raise Refused(
                    f"{path}.{name} is quantised, which have no room for an update: save the adapter, load "
                    "it on the base without quantisation (mmpeft.load takes it there), and merge that"
                )
            if tensor is not None and (before is None or not torch.equal(tensor, before)):
                check_writable(host, name, path)
                if name in host._buffers and name in host._non_persistent_buffers_set:
                    raise Refused(
                        f"merging would change the buffer {path}.{name}, which no state dict of the base holds"
                    )
                like = base.get(name)
                folded.append((host, name, tensor if like is None else tensor.to(like.dtype)))
    paths = {id(host): path for path, host in state.hosts.items()}
    with state.changing():
        state.merged[tuning.name] = [(paths[id(host)], name, exchange(host, name, t)) for host, name, t in folded]


@torch.no_grad()
def unmerge(tuning: Attached) -> None:
    """Put the original tensors back, bit for bit."""
    state = tuning._state
    if tuning.name not in state.merged:
        raise StateError(f"tuning {tuning.name!r} is not merged")
    if next(reversed(state.merged)) != tuning.name:
        raise StateError(f"unmerge {next(reversed(state.merged))!r} first: it was merged on top of {tuning.name!r}")
    with unchanged_on_error(tuning.model), state.changing():
        for path, name, _ in state.merged[tuning.name]:
            check_writable(state.hosts[path], name, path)
        for path, name, original in state.merged.pop(tuning.name):
            exchange(state.hosts[path], name, original)


def _hooks_by_host(tuning: Attached) -> dict[str, list[tuple[Hook, Part]]]:
    """Hooks of each host, innermost part first, as the forward pass applies them."""
    found: dict[str, list[tuple[Hook, Part]]] = {}
    for placement in tuning.placements:
        for hook in placement.hooks if not placement.part.resting else ():
            if placement.part.unmergeable:
                placement.part.fold(tuning._state.hosts[hook.path], hook, {})
            found.setdefault(hook.path, []).append((hook, placement.part))
    return {path: sorted(hooks, key=lambda pair: -pair[1].order) for path, hooks in found.items()}


def check_whole(tuning: Attached) -> None:
    """Raise ConfigError for a host that is no longer part of the model, Refused for tensors that are sharded."""
    present = {id(module) for module in tuning.model.modules()}
    for placement in tuning.placements:
        if id(tuning._state.hosts[placement.home]) not in present:
            raise ConfigError(
                f"{placement.home} hosts parts of {tuning.name!r} and is no longer part of the model, so that "
                "neither its file nor its merged weights would be whole: change the model before attach"
            )
    tensors = (p for _, module in own_modules(tuning.model) for p in module._parameters.values())
    if any(map(is_sharded, tensors)) or any(map(is_sharded, tuning.parameters())):
        raise Refused(
            "the tensors are sharded over processes, so that none of these has the whole of one: gather them first "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load that "
            "into a model that is not sharded, and save or merge there"
        )


def _wide(tensor: Leaf) -> Leaf:
    """In at least 32 bits, as sums are made; what is quantised as it is."""
    plain = isinstance(tensor, Tensor) and not isinstance(tensor, QuantizedWeight)
    return tensor.float() if plain and tensor.element_size() < 4 else tensor


def exchange(host: nn.Module, name: str, tensor: Tensor | None) -> Tensor | None:
    """Put another tensor under a name of a module; return the one it had."""
    if name in host._buffers:
        before, host._buffers[name] = host._buffers[name], tensor
        return before
    held = host._parameters.get(name)
    wrapped = tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    host._parameters[name] = wrapped
    return held

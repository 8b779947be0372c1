"""Tensors that accelerate's hooks hold elsewhere between passes: on the CPU, on the disk, under the `meta` device.

A backbone's are fetched where its values are needed. Those of parts are taken back for good: they are few, they train,
and a pass reads them outside of any forward that a hook could load them for.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.hosting.modules import own_modules
from mmpeft.types import Attribute, Untyped

if TYPE_CHECKING:
    from mmpeft.parts.base import Placement
    from mmpeft.surgery.state import State

HOOK = "_hf_hook"
_LOCK = threading.RLock()


class _Count:
    """How many hooks this process has put on hosts and parts: a state that has seen as many need not look again."""

    hooks = 0


class Hooked:
    """The attribute `_hf_hook` of hosts and parts, which notices that a hook is put there."""

    def __get__(self, module: nn.Module | None, owner: type) -> Untyped:
        if module is None:
            return self
        if HOOK not in module.__dict__:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {HOOK!r}")
        return module.__dict__[HOOK]

    def __set__(self, module: nn.Module, hook: Untyped) -> None:
        if any(hasattr(own, "storage_dtype") for own in _each(hook)):
            raise Refused(NARROW.format("a tuned layer"))
        module.__dict__[HOOK] = hook
        _Count.hooks += 1

    def __delete__(self, module: nn.Module) -> None:
        if module.__dict__.pop(HOOK, None) is None:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {HOOK!r}")


NARROW = (
    "{} is quantised between passes (layerwise casting), and the parts under it would be too, so that their "
    "values were lost: store the base in the type it computes in, or quantise it by bitsandbytes or torchao"
)


def _each(hook: Untyped) -> tuple[Untyped, ...]:
    """The hooks that one hook consists of."""
    return tuple(getattr(hook, "hooks", None) or (hook,))


def _offloading(module: nn.Module) -> list[Untyped]:
    """Those of a module's hooks that hold tensors elsewhere."""
    hook = module.__dict__.get(HOOK)
    return [] if hook is None else [own for own in _each(hook) if getattr(own, "weights_map", None) is not None]


def same_tensor(module: nn.Module, name: str) -> Hashable:
    """What all names of one tensor have in common, those of a tensor that hooks hold in memory included."""
    own = module._parameters.get(name, module._buffers.get(name))
    if own is None:
        return id(module), name
    for hook in _offloading(module) if own.is_meta else ():
        try:
            held = hook.weights_map[name]
        except KeyError:
            continue
        if hook.weights_map[name] is held:  # and not read from the disk each time
            return "held", held.data_ptr(), held.shape
    return id(own)


def check_writable(module: nn.Module, name: str, path: str) -> None:
    """Raise Refused for a tensor that a hook sets anew at every pass, whatever has been written to it since."""
    value = module._parameters.get(name, module._buffers.get(name))
    held = any(hook.offload and name in hook.weights_map for hook in _offloading(module))
    if held or (isinstance(value, Tensor) and value.is_meta):
        raise Refused(
            f"{path}.{name} is held on the CPU or the disk by accelerate, which sets it anew at every pass, so that "
            "what is merged into it or taken out of it were lost: remove the hooks first "
            "(accelerate.hooks.remove_hook_from_submodules(model)), or run the tuning unmerged"
        )


def check_present(model: nn.Module, what: str) -> None:
    """Raise Refused for a model of which some tensors are elsewhere."""
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise Refused(
                f"{what} needs every weight, and {path} is on the meta device, held elsewhere by accelerate: remove "
                "its hooks first (accelerate.hooks.remove_hook_from_submodules(model))"
            )


def fetched(module: nn.Module, name: str, value: Attribute) -> Attribute:
    """A module's own tensor, from where a hook of its own holds it, on the device that it runs on."""
    if isinstance(value, Tensor) and value.is_meta:
        for hook in _offloading(module):
            try:
                found: Tensor = hook.weights_map[name]
            except KeyError:
                continue
            return found.to(device=hook.execution_device or found.device, dtype=value.dtype)
    return value


MADE = (
    "would be on the meta device and have no values, as the base has none there yet, or accelerate loads it with a "
    "module around it (preload_module_classes) or attach runs inside init_empty_weights: load the weights, then attach"
)
MOVED = (
    "has been moved to the meta device together with a module around it (preload_module_classes of accelerate), where "
    "it can neither run nor train: remove the hooks, and offload without that option"
)


def check_values(placements: list[Placement], why: str = MADE) -> None:
    """Raise Refused for parts without values, by default because they were made while the base has none."""
    for placement in placements:
        for name, tensor in (*placement.part.named_parameters(), *placement.part.named_buffers()):
            if tensor.is_meta:
                raise Refused(f"{placement.home or 'the model'}: {placement.key}.{name} {why}")


def check_stored(model: nn.Module) -> None:
    """Raise Refused for a model whose layers are cast to 8 bits between passes, and the parts under them with them.

    accelerate's hook is the module's attribute; diffusers keeps its hooks by name.
    """
    for path, module in own_modules(model):
        narrow = any(hasattr(hook, "storage_dtype") for hook in _each(module.__dict__.get(HOOK)))
        theirs = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
        if narrow or any(hasattr(hook, "storage_dtype") for hook in theirs.values()):
            raise Refused(NARROW.format(path or "the model"))


def know(state: State, placements: list[Placement]) -> None:
    """Remember which tensors parts were made with: an optimiser may hold them when others come in their place."""
    for placement in placements:
        for module in placement.part.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    state.made[id(module), name] = tensor


def looked(state: State) -> bool:
    """Whether no hook has been put anywhere since the parts of a model were last looked after."""
    return state.hooks == _Count.hooks


@torch.no_grad()
def take_back(state: State) -> None:
    """Give parts their tensors again, the very same ones if anybody holds them, and have hooks leave them there.

    Raises:
        Refused: tensors that no hook on their own module holds.
    """
    with _LOCK:
        seen = _Count.hooks
        for placements in list(state.placements.values()):
            for placement in placements:
                for module in placement.part.modules():
                    _take_back(state, module)
            check_values(placements, MOVED)
        state.hooks = seen


def _take_back(state: State, module: nn.Module) -> None:
    for name, tensor in module._parameters.items():
        if tensor is not None and tensor.is_meta:
            value = fetched(module, name, tensor)
            own = state.made.get((id(module), name))
            if own is None or own.is_meta or own.shape != value.shape:
                own = nn.Parameter(value, tensor.requires_grad)
            own.data = value
            module._parameters[name] = own
    for name, buffer in module._buffers.items():
        module._buffers[name] = fetched(module, name, buffer)
    for hook in _offloading(module):
        hook.offload, hook.weights_map = False, None

"""What other libraries do to a model around `attach`: the order that works, and modules that are replaced."""

from __future__ import annotations

from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mmpeft.errors import ConfigError, Refused
from mmpeft.hosting.modules import CHILD, SEAT, own_modules

INSIDE = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
INSIDE |= {"FullyShardedDataParallel": "module", "DeepSpeedEngine": "module", "_FabricModule": "_forward_module"}
"""Classes that wrap a model, and where the model is."""

SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
"""Classes whose modules hand out tensors that they have collected when they were made."""


def check_order(model: nn.Module) -> None:
    """Raise for a model that another library has wrapped or sharded, which would not know of new tensors.

    Raises:
        ConfigError: a wrapper: its model is inside. Refused: sharded: what is attached now would not be reduced.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    for name in INSIDE.keys() & names:
        raise ConfigError(
            f"the model is wrapped in a {name}; attach to the model itself ({INSIDE[name]}), and before it is wrapped: "
            "tensors that come later are not known to it"
        )
    for path, module in own_modules(model):
        if SHARDED & {cls.__name__ for cls in type(module).__mro__}:
            raise Refused(
                f"{path or 'the model'} is sharded already, and tensors attached now would be neither sharded nor "
                "reduced over processes: attach first, then shard"
            )


@cache
def watch_replacements() -> None:
    """From now on, refuse that a module that hosts parts is replaced by another one."""
    register_module_module_registration_hook(_check_replacement)


def _check_replacement(parent: nn.Module, name: str, new: object) -> None:
    old = parent._modules.get(name)
    if old is None or old is new or not any(SEAT in m.__dict__ for m in old.modules()):
        return
    inside = {id(module) for module in new.modules()} if isinstance(new, nn.Module) else set()
    lost = [m for m in old.modules() if CHILD in m._modules and id(m) not in inside]
    if lost:
        path = lost[0].__dict__[SEAT].path
        raise Refused(
            f"{name!r} cannot be replaced by another module: {path} in it hosts parts of a tuning, which would be "
            "lost. Replace it (resize embeddings, give a new head) before attach, or detach() first"
        )

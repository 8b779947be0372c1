"""`Tuning`: the handle on one method attached to one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmpeft.controllers import Controllers
from mmpeft.controllers.layers import rest_below
from mmpeft.errors import AdapterFileError, ConfigError, Refused, nearest
from mmpeft.hosting.few_bits import FewBits
from mmpeft.hosting.host import base_value, is_sharded
from mmpeft.hosting.modules import own_modules
from mmpeft.hosting.offload import check_writable
from mmpeft.hosting.recompute import Recompute
from mmpeft.hosting.values import unfit
from mmpeft.methods.base import Method, with_depth
from mmpeft.parts.base import Placement
from mmpeft.sites import sites
from mmpeft.surgery.attaching import attach_saved, detach, host
from mmpeft.surgery.choice import use
from mmpeft.surgery.liveness import Liveness, liveness
from mmpeft.surgery.report import Report, report
from mmpeft.surgery.state import State, state_of, state_with
from mmpeft.surgery.transaction import unchanged_on_error

if TYPE_CHECKING:
    from mmpeft.formats.exchange import Exported
    from mmpeft.formats.merged import Merged

BatchLike = Any


def tunings(model: nn.Module) -> dict[str, Tuning]:
    """Every tuning of a model, by name; also for a copy or an unpickled model."""
    state = state_of(model)
    return {name: Tuning(model, name) for name in state.placements} if state else {}


class Tuning:
    """One method attached to one model under a name.

    Holds no state of its own: everything lives on the model, so copies and pickles of the model carry it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        state_with(model, name)
        self.model, self.name = model, name

    def __repr__(self) -> str:
        return f"Tuning({self.name!r}: {self.method} on {type(self.model).__name__})"

    @property
    def _state(self) -> State:
        return state_with(self.model, self.name)

    @property
    def method(self) -> Method:
        return self._state.methods[self.name]

    @property
    def placements(self) -> list[Placement]:
        return self._state.placements[self.name]

    @property
    def controllers(self) -> Controllers:
        """What drives the parts while they train: the six moments a training loop calls, and the loss's extra terms."""
        return self._state.controllers[self.name]

    # -- what trains ----------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable tensors by `<host path>.<part>.<tensor>`: where they act, whatever the tuning's name."""
        for placement in self.placements:
            prefix = ".".join(filter(None, (placement.home, placement.key)))
            for name, parameter in placement.part.named_parameters():
                yield f"{prefix}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable tensors, ready for an optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Detached trainable tensors by name, and frozen ones that a part brought with it."""
        return {name: tensor.detach() for name, tensor in self._named_tensors()}

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        for placement in self.placements:
            prefix = ".".join(filter(None, (placement.home, placement.key)))
            for name, tensor in placement.part.frozen().items():
                yield f"{prefix}.{name}", tensor

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every tensor of `state_dict`; nothing is changed unless all names and shapes agree.

        Raises:
            AdapterFileError: missing or unknown names, other shapes, or values that are not finite.
        """
        own = dict(self._named_tensors())
        missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        if missing or extra:
            hint = nearest(extra[0], missing) if extra else ""
            raise AdapterFileError(
                f"the tensors do not fit {self.method}: {len(missing)} missing (first: {missing[:2]}), "
                f"{len(extra)} unknown (first: {extra[:2]}).{hint}"
            )
        for name, parameter in own.items():
            if tensors[name].shape != parameter.shape:
                raise AdapterFileError(
                    f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
                )
            why = unfit(tensors[name], parameter.dtype)
            if why:
                raise AdapterFileError(f"{name} {why}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    # -- what runs ------------------------------------------------------------------------------------------

    def use(self) -> use:
        """Run this tuning: at once, or for the length of a `with` block."""
        return use(self.model, self.name)

    @property
    def recompute(self) -> Recompute:
        """What every block computes again in the backward pass: None, `pointwise` operations, or all (`block`)."""
        return self._state.recompute

    @recompute.setter
    def recompute(self, mode: Recompute) -> None:
        if mode not in (None, "pointwise", "block"):
            raise ConfigError(f"recompute is None, 'pointwise' or 'block', got {mode!r}")
        if mode and not self._state.blocks:
            raise ConfigError(f"recompute needs block sites; the anatomy of {type(self.model).__name__} names none")
        state = self._state
        with state.changing():
            for path in state.blocks if mode else ():
                host(self.model, state, path)
            state.recompute = mode

    def leave_out(self, layers: int) -> None:
        """Run the first `layers` blocks plain, without their parts, from now on; 0 lets all parts run.

        Raises:
            ConfigError: no number of blocks that leaves a part. Refused: parts that need one another across blocks.
        """
        if not self.method.sitewise:
            raise Refused(f"the parts of {self.method} do not act at one site each, so that none can be left out")
        placements = with_depth(self.placements, sites(self.model))
        deepest = max(p.depth for p in placements)
        if not 0 <= layers <= deepest:
            raise ConfigError(f"leave_out: expected a number of blocks from 0 to {deepest}, got {layers}")
        with self._state.changing():
            rest_below(placements, layers)

    # -- merging --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the tuning into the base weights, in fp32; the originals are kept for `unmerge`.

        Raises:
            Refused: a part is no change of base weights, or accelerate holds those elsewhere; nothing is changed then.
        """
        with unchanged_on_error(self.model):
            self._merge()

    def _merge(self) -> None:
        state = self._state
        self._check_whole()
        if self.name in state.merged:
            raise ConfigError(f"tuning {self.name!r} is merged already")
        folded: list[tuple[nn.Module, str, Tensor | None]] = []
        for path, hooks in self._hooks_by_host().items():
            host = state.hosts[path]
            names = {hook.name for hook, _ in hooks if hook.kind == "read"} | {"weight", "bias"}
            base = {n: base_value(host, n) for n in names if n in host._parameters or n in host._buffers}
            wide = {n: _wide(t) for n, t in base.items()}
            params: dict[str, Tensor | None] = dict(wide)
            for hook, part in hooks:
                part.fold(host, hook, params)
            for name, tensor in params.items():
                before = wide.get(name)
                if tensor is not before and isinstance(base.get(name), FewBits):
                    raise Refused(
                        f"{path}.{name} is held in few bits, which have no room for an update: save the adapter, load "
                        "it on the base in full (mmpeft.load takes it there), and merge that"
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
            state.merged[self.name] = [(paths[id(host)], name, exchange(host, name, t)) for host, name, t in folded]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original tensors back, bit for bit.

        Raises:
            ConfigError: not merged, or another tuning was merged on top of it.
            Refused: accelerate holds the base weights elsewhere.
        """
        state = self._state
        if self.name not in state.merged:
            raise ConfigError(f"tuning {self.name!r} is not merged")
        if next(reversed(state.merged)) != self.name:
            raise ConfigError(f"unmerge {next(reversed(state.merged))!r} first: it was merged on top of {self.name!r}")
        with unchanged_on_error(self.model), state.changing():
            for path, name, _ in state.merged[self.name]:
                check_writable(state.hosts[path], name, path)
            for path, name, original in state.merged.pop(self.name):
                exchange(state.hosts[path], name, original)

    def _hooks_by_host(self) -> dict[str, list[tuple[Any, Any]]]:
        """Hooks of each host, innermost part first, as the forward pass applies them."""
        found: dict[str, list[tuple[Any, Any]]] = {}
        for placement in self.placements:
            for hook in placement.hooks if not placement.part.resting else ():
                if placement.part.unmergeable:
                    placement.part.fold(self._state.hosts[hook.path], hook, {})
                found.setdefault(hook.path, []).append((hook, placement.part))
        return {path: sorted(hooks, key=lambda pair: -pair[1].order) for path, hooks in found.items()}

    @torch.no_grad()
    def bake(self) -> None:
        """Drop what only training needed (the MLP behind a prefix, closed rank components); answers stay the same.

        What is left can be trained, saved and loaded: as the method that `tuning.method` then names.
        """
        method, tensors = self.method.compact(self.placements)
        if method is not self.method:
            with unchanged_on_error(self.model):
                self._replace(method, tensors)

    def _check_whole(self) -> None:
        """Raise ConfigError for a host that is no longer part of the model, Refused for tensors that are sharded."""
        present = {id(module) for module in self.model.modules()}
        for placement in self.placements:
            if id(self._state.hosts[placement.home]) not in present:
                raise ConfigError(
                    f"{placement.home} hosts parts of {self.name!r} and is no longer part of the model, so that "
                    "neither its file nor its merged weights would be whole: change the model before attach"
                )
        tensors = (p for _, module in own_modules(self.model) for p in module._parameters.values())
        if any(map(is_sharded, tensors)) or any(map(is_sharded, self.parameters())):
            raise Refused(
                "the tensors are sharded over processes, so that none of these has the whole of one: gather them first "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load that "
                "into a model that is not sharded, and save or merge there"
            )

    def _replace(self, method: Method, values: list[dict[str, Tensor]]) -> None:
        """Another method in the place of this one, its parts with these values."""
        route = self._state.route
        self.detach()
        attach_saved(self.model, method, self.name)
        for placement, own in zip(self.placements, values, strict=True):
            for name, tensor in {**dict(placement.part.named_parameters()), **placement.part.frozen()}.items():
                tensor.copy_(own[name])
        use(self.model, route)

    # -- checks, reports, files -----------------------------------------------------------------------------

    def detach(self) -> None:
        """Remove the tuning; with the last one the model is what it was before, class and bits."""
        detach(self.model, self.name)

    def liveness(self, batch: BatchLike) -> Liveness:
        """Prove on one batch that every trainable tensor learns and no frozen one moves; changes nothing."""
        return liveness(self, batch)

    def report(self) -> Report:
        """Sites, parameters and memory; prints as a table."""
        return report(self)

    def save(self, folder: str | Path, *, bake: bool = False) -> Path:
        """Write `adapter.safetensors` and `adapter.json`, atomically; with `bake`, what `bake()` would leave."""
        from mmpeft.formats.native import save

        self._check_whole()
        return save(self, folder, bake=bake)

    def compact(self) -> tuple[Method, dict[str, Tensor], list[Placement]]:
        """The method, tensors and parts that `bake()` would leave, beside the tuning as it is."""
        method, tensors = self.method.compact(self.placements)
        if method is self.method:
            return method, self.state_dict(), self.placements
        placements = method.place(self.model, sites(self.model))
        found = {}
        for placement, own in zip(placements, tensors, strict=True):
            prefix = ".".join(filter(None, (placement.home, placement.key)))
            found.update({f"{prefix}.{name}": tensor.detach() for name, tensor in own.items()})
        return method, found, placements

    def export(
        self, path: str | Path, format: Literal["peft", "diffusers", "kohya", "comfy"] = "peft", *, verify: bool = True
    ) -> Exported:
        """Write the tuning as other tools read it, and prove it: reloaded by its consumer, compared layer by layer.

        Raises:
            Refused: a part that the format cannot hold. AdapterFileError: a reader finds something else.
        """
        from mmpeft.formats.exchange import export

        self._check_whole()
        return export(self, path, format, verify=verify)

    def save_merged(self, path: str | Path) -> Merged:
        """Write the whole model with the tuning merged in, as its own library reads it; the model here stays as it is.

        Raises:
            Refused: a part cannot be merged, or the library's model has no place for a tensor that merging creates.
        """
        from mmpeft.formats.merged import save_merged

        return save_merged(self, path)


def _wide(tensor: Any) -> Any:
    """In at least 32 bits, as sums are made; what is held in few bits as it is."""
    plain = isinstance(tensor, Tensor) and not isinstance(tensor, FewBits)
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

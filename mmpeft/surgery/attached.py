"""`Attached`: one method attached to one model, and what can be done with it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmpeft.controllers import Controllers
from mmpeft.controllers.layers import rest_below
from mmpeft.errors import AdapterFileError, ConfigError, Refused, nearest, renamed
from mmpeft.hosting.recompute import Recompute
from mmpeft.hosting.values import unfit
from mmpeft.methods.base import Method, with_depth
from mmpeft.parts.base import Placement
from mmpeft.sites import sites
from mmpeft.surgery.attaching import detach, host
from mmpeft.surgery.baking import bake, compact
from mmpeft.surgery.choice import use
from mmpeft.surgery.liveness import Liveness, liveness
from mmpeft.surgery.merging import merge, unmerge
from mmpeft.surgery.report import Report, report
from mmpeft.surgery.state import State, state_with
from mmpeft.types import Batch


class Attached:
    """What a tuning is made of: a model, a name on it, and the method, parts and tensors under that name.

    Holds no state of its own: everything lives on the model, so copies and pickles of the model carry it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        state_with(model, name)
        self.model, self.name = model, name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.method} on {type(self.model).__name__})"

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
            for name, parameter in placement.part.named_parameters():
                yield f"{placement.prefix}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable tensors, ready for an optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Detached trainable tensors by name, and frozen ones that a part brought with it."""
        return {name: tensor.detach() for name, tensor in self._named_tensors()}

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        for placement in self.placements:
            for name, tensor in placement.part.frozen().items():
                yield f"{placement.prefix}.{name}", tensor

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

    def merge(self) -> None:
        """Fold the tuning into the base weights, in fp32; the originals are kept for `unmerge`.

        Raises:
            Refused: a part is no change of base weights, or accelerate holds those elsewhere; nothing is changed then.
        """
        merge(self)

    def unmerge(self) -> None:
        """Put the original tensors back, bit for bit.

        Raises:
            ConfigError: not merged, or another tuning was merged on top of it.
            Refused: accelerate holds the base weights elsewhere.
        """
        unmerge(self)

    def for_inference(self) -> None:
        """Drop what only training needed (the MLP behind a prefix, closed rank components); answers stay the same.

        What is left can be trained, saved and loaded: as the method that `tuning.method` then names.
        """
        bake(self)

    def inference_form(self) -> tuple[Method, dict[str, Tensor], list[Placement]]:
        """The method, tensors and parts that `for_inference()` would leave, beside the tuning as it is."""
        return compact(self)

    def bake(self) -> None:
        """Deprecated name of `for_inference`."""
        renamed("tuning.bake()", "tuning.for_inference()")
        self.for_inference()

    def compact(self) -> tuple[Method, dict[str, Tensor], list[Placement]]:
        """Deprecated name of `inference_form`."""
        renamed("tuning.compact()", "tuning.inference_form()")
        return self.inference_form()

    # -- checks ---------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Remove the tuning; with the last one the model is what it was before, class and bits."""
        detach(self.model, self.name)

    def liveness(self, batch: Batch) -> Liveness:
        """Prove on one batch that every trainable tensor learns and no frozen one moves; changes nothing."""
        return liveness(self, batch)

    def report(self) -> Report:
        """Sites, parameters and memory; prints as a table."""
        return report(self)

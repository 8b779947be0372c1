"""Does every tensor that should train get a gradient, and does no other tensor move?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmpeft.errors import SiteError
from mmpeft.hosting.modules import own_modules
from mmpeft.hosting.quantized import dense
from mmpeft.types import Batch, Output

if TYPE_CHECKING:
    from mmpeft.surgery.attached import Attached

STEPS = 2
"""A tensor behind a zero-initialised one has its first gradient in the second step."""


@dataclass(frozen=True)
class Pulse:
    """One trainable tensor: the largest gradient norm seen within two steps."""

    role: str
    tensor: str
    gradient: float

    @property
    def alive(self) -> bool:
        return self.gradient > 0


@dataclass(frozen=True)
class Liveness:
    """The outcome of a liveness check."""

    pulses: list[Pulse]
    moved: list[str]
    """Frozen tensors and buffers of the base whose bits changed."""

    @property
    def dead(self) -> list[str]:
        return [pulse.tensor for pulse in self.pulses if not pulse.alive]

    @property
    def ok(self) -> bool:
        return not self.dead and not self.moved

    def check(self) -> Liveness:
        """Return self, or raise SiteError naming the dead and the moved tensors."""
        if not self.ok:
            raise SiteError(
                f"{len(self.dead)} of {len(self.pulses)} trainable tensors get no gradient (first: {self.dead[:3]}); "
                f"{len(self.moved)} frozen tensors moved (first: {self.moved[:3]}). A dead site means that the "
                "backbone does not use it as its anatomy says: report it, or restrict at=."
            )
        return self

    def __rich__(self) -> Table:
        table = Table(title=f"liveness: {len(self.dead)} dead of {len(self.pulses)}, {len(self.moved)} frozen moved")
        for name in ("role", "tensors", "dead", "smallest gradient norm"):
            table.add_column(name, justify="left" if name == "role" else "right")
        for role in dict.fromkeys(pulse.role for pulse in self.pulses):
            own = [pulse for pulse in self.pulses if pulse.role == role]
            dead = sum(not pulse.alive for pulse in own)
            table.add_row(role, str(len(own)), str(dead), f"{min(pulse.gradient for pulse in own):.1e}")
        return table

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def liveness(tuning: Attached, batch: Batch) -> Liveness:
    """Two AdamW steps (with weight decay) on one batch; the model is left as it was.

    The loss is a fixed random projection of every floating output, in evaluation mode: stochastic depth may drop a
    whole branch twice in a row. One more forward pass, in training mode, shows which buffers move then. `batch` is a
    tensor, a tuple of arguments or a mapping of keyword arguments.
    """
    model = tuning.model
    trainable = dict(tuning.named_parameters())
    loud = {id(p) for p in _checked(tuning)}
    roles = {
        id(parameter): placement.role for placement in tuning.placements for parameter in placement.part.parameters()
    }
    norms = dict.fromkeys(trainable, 0.0)
    with _untouched(model, list(trainable.values())), tuning.use(), torch.enable_grad():
        frozen = {n: p for n, p in model.named_parameters() if id(p) not in roles}
        before = {name: fingerprint(p) for name, p in frozen.items()}
        kept = buffer_prints(model)
        optimizer = torch.optim.AdamW([{"params": list(trainable.values())}], lr=1e-3, weight_decay=0.1)
        for step in range(STEPS if trainable else 0):  # statistics alone have nothing to step
            optimizer.zero_grad()
            loss = _loss(call(model, batch), seed=step)
            if loss.requires_grad:  # else nothing that trains is in it, which is what the report then says
                torch.autograd.backward(loss)
            for name, parameter in trainable.items():
                if parameter.grad is not None:
                    norms[name] = max(norms[name], float(parameter.grad.norm()))
            optimizer.step()
        model.train()
        call(model, batch)
        moved = [name for name, p in frozen.items() if fingerprint(p) != before[name]] + moved_buffers(model, kept)
    pulses = [Pulse(roles[id(p)], name, norms[name]) for name, p in trainable.items() if id(p) in loud]
    return Liveness(pulses, moved)


def _checked(tuning: Attached) -> Iterator[nn.Parameter]:
    """Trainable tensors that a loss must reach; not those that a part declares `quiet`."""
    for placement in tuning.placements:
        for name, parameter in placement.part.named_parameters():
            if name not in placement.part.quiet:
                yield parameter


def call(model: nn.Module, batch: Batch) -> Output:
    """The model on a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _loss(output: Output, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    values = output.values() if isinstance(output, Mapping) else output
    for leaf in tree_leaves(list(values) if isinstance(output, Mapping) else values):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator).to(leaf.device)
            total = total.to(leaf.device) + (leaf.float() * weights).sum()
    return total


def fingerprint(tensor: Tensor) -> int:
    """A weighted sum of the tensor's words: changes with any single bit, costs no copy of the model."""
    if tensor.is_meta:
        return 0
    data = dense(tensor.detach()).contiguous().view(-1).view(torch.uint8)
    words = data.view(torch.int32) if len(data) % 4 == 0 else data
    return int((words * (torch.arange(len(words), device=data.device, dtype=torch.int64) % 1021 * 2 + 1)).sum())


Prints = dict[str, tuple[object, int]]
"""Buffer → what it is (type and shape) and a fingerprint of its values."""

LARGE = 1 << 16
"""Elements from which a buffer of whole numbers is a table that nothing moves, such as a mask or an index."""


def buffer_prints(model: nn.Module) -> Prints:
    """Fingerprints of the base's buffers that are part of its state dict; what it only caches may change."""
    return {name: ((b.dtype, b.shape), fingerprint(b)) for name, b in _base_buffers(model)}


def moved_buffers(model: nn.Module, before: Prints) -> list[str]:
    """Buffers whose values are others than they were; what was cast, resized or removed since is left out."""
    now = dict(_base_buffers(model))
    same = {name: b for name, b in now.items() if name in before and (b.dtype, b.shape) == before[name][0]}
    return [name for name, b in same.items() if fingerprint(b) != before[name][1]]


def _base_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in own_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            if buffer.is_floating_point() or buffer.is_complex() or buffer.numel() < LARGE:
                yield f"{path}.{name}".lstrip("."), buffer


@contextmanager
def _untouched(model: nn.Module, trainable: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode inside; values, gradients, buffers, modes and random state come back on exit.

    A buffer comes back as the object it was: some modules put another one in its place.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    values = [(p, p.detach().clone(), p.grad) for p in trainable]
    stores = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    for parameter in trainable:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.__dict__["training"] = training
        with torch.no_grad():
            for parameter, value, grad in values:
                parameter.copy_(value)
                parameter.grad = grad
            for store, held in stores:
                store.update(held)
            for buffer, value in buffers:
                buffer.copy_(value)

"""`check`: every invariant that applies, on anybody's model and method."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmpeft.errors import ConfigError, MMPEFTError, SiteError, nearest
from mmpeft.methods.base import Method
from mmpeft.sites import sites
from mmpeft.surgery.liveness import call
from mmpeft.testing.invariants import INVARIANTS
from mmpeft.testing.session import InvariantError, NotApplicable, Read, Session, first_tensor
from mmpeft.tuning import attach


@dataclass
class Report:
    """Which invariants hold for a method on a model, and why others say nothing about them."""

    method: Method
    model: str
    held: list[str] = field(default_factory=list)
    not_applicable: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    """Why the method refuses the model, where that was expected."""

    def __str__(self) -> str:
        if self.refusal:
            return f"{self.method} refuses {self.model}, which it leaves untouched: {self.refusal}"
        lines = [f"{self.method} on {self.model}: {len(self.held)} invariants hold"]
        lines += [f"  {name}: {INVARIANTS[name].purpose}" for name in self.held]
        lines += [f"  {name} does not apply: {why}" for name, why in self.not_applicable.items()]
        return "\n".join(lines)


def check(
    model: nn.Module,
    batch: Any,
    method: Method,
    *,
    read: Read = first_tensor,
    decide: Callable[[nn.Module, Method], Method] | None = None,
    only: Iterable[str] | None = None,
    refuses: str | None = None,
) -> Report:
    """Try every invariant that applies to a method on a model; both are anybody's. The model itself stays as it is.

    `batch` is a tensor, a tuple of arguments or a mapping of keyword arguments, of two rows or more. `read` takes from
    an output what is compared, one row a sample: by default its first floating tensor. A method that chooses by data
    scores the batch, unless `decide(model, method)` gives it decided. `only` names some of `INVARIANTS`, also those
    that are not tried unasked (`compiles_as_one_graph`). `refuses` is a pattern of the reason with which the method
    must refuse this model.

    >>> import torch, mmpeft
    >>> from mmpeft.testing import check
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> report = check(model, torch.randn(2, 4), mmpeft.LoRA(rank=2))
    >>> report.held[0], report.not_applicable["recomputes_the_same_gradients"]
    ('starts_as_the_base', 'the model names no blocks')

    Raises:
        InvariantError: one does not hold. MMPEFTError: the method refuses the model unexpectedly.
        ConfigError: `only` names none of them.
    """
    wanted = [name for name, own in INVARIANTS.items() if own.always] if only is None else list(only)
    for name in wanted:
        if name not in INVARIANTS:
            raise ConfigError(f"no invariant {name!r}; known: {', '.join(INVARIANTS)}.{nearest(name, INVARIANTS)}")
    example = None if _known(model) else batch
    report = Report(method, type(model).__name__)

    def make() -> nn.Module:
        return copy.deepcopy(model).eval()

    if refuses is not None:
        report.refusal = check_refusal(make(), batch, method, refuses, read=read, example=example)
        return report
    session = Session(make, batch, method, read=read, decide=decide, example=example)
    for name, invariant in INVARIANTS.items():
        if name in wanted:
            try:
                invariant(session)
            except NotApplicable as reason:
                report.not_applicable[name] = str(reason)
            else:
                report.held.append(name)
    return report


def _known(model: nn.Module) -> bool:
    """Whether the model's sites are known without a batch."""
    try:
        sites(model)
    except SiteError:
        return False
    return True


def check_refusal(
    model: nn.Module,
    batch: Any,
    method: Method,
    refuses: str,
    *,
    read: Read = first_tensor,
    example: Any = None,
    attach: Callable[..., object] = attach,
) -> str:
    """A method refuses a model by a reason that `refuses` matches, and leaves it untouched; gives the reason.

    Raises:
        InvariantError: no refusal, another reason, or something of the model is no longer what it was.
    """

    def broken(where: str, expected: str, received: object) -> InvariantError:
        return InvariantError("refusal_changes_nothing", method, where, expected, str(received))

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return read(call(model, batch))

    before, kind, keys = answer(), type(model), list(model.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        attach(model, method, **({} if example is None else {"example": example}))
    except MMPEFTError as error:
        reason = str(error)
    else:
        raise broken("attach", f"a refusal: {refuses}", "none")
    if not re.search(refuses, reason):
        raise broken("attach", f"a refusal: {refuses}", reason)
    if type(model) is not kind or list(model.state_dict()) != keys:
        raise broken("the model", "its class and keys", type(model).__name__)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != flags[name]:
            raise broken(name, f"requires_grad={flags[name]}", parameter.requires_grad)
    if not torch.equal(answer(), before):
        raise broken("the model's answer", "the one from before, bit for bit", "another one")
    return reason

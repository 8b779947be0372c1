"""One method on one model while its invariants are tried: what was before, what is now, and how the two compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mmpeft.hosting.quantized import dense
from mmpeft.methods.base import Method
from mmpeft.sites import sites
from mmpeft.surgery.choice import use
from mmpeft.surgery.liveness import call
from mmpeft.tuning import attach

Read = Callable[[Any], Tensor]
"""What an answer of the model is compared by: a tensor of one row a sample."""


class InvariantError(AssertionError):
    """A method breaks an invariant on a model; says which, where, and what was expected and received."""

    def __init__(self, invariant: str, method: Method, where: str, expected: str, received: str) -> None:
        super().__init__(f"{invariant}: {method} at {where}: expected {expected}, received {received}")
        self.invariant, self.method, self.where, self.expected, self.received = (
            invariant,
            method,
            where,
            expected,
            received,
        )


class NotApplicable(Exception):
    """An invariant says nothing about this method on this model; the message is the reason."""


class Broken(Exception):
    """What an invariant has found, before its name and the method are known."""

    def __init__(self, where: str, expected: str, received: str) -> None:
        super().__init__(where, expected, received)
        self.where, self.expected, self.received = where, expected, received


def first_tensor(output: Any) -> Tensor:
    """The first floating tensor of an output."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    return next(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def weigh(answer: Tensor) -> Tensor:
    """A number that depends on every entry of an answer, each in its own way."""
    weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(5))
    return (answer.float() * weights.to(answer.device)).sum()


class Session:
    """A model of `make` with a method just attached; invariants move its tensors and read its answers.

    `read` takes the tensor from an output by which answers are compared, one row a sample; `rows_apart` says whether
    those rows depend on one another, where that is known. `decide(model, method)` gives the method with all decided
    that batches or files decide; by default it scores the batch.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        batch: Any,
        method: Method,
        *,
        read: Read = first_tensor,
        decide: Callable[[nn.Module, Method], Method] | None = None,
        example: Any = None,
        rows_apart: bool | None = None,
    ) -> None:
        self.make, self.batch, self.read, self.example = make, batch, read, example
        self.given, self.rows_apart = method, rows_apart
        self.model = make()
        self.plain = self.answer()
        self.kind = type(self.model)
        self.original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.method = (decide or self._decide)(self.model, method) if not method.decided else method
        self.after_deciding = self.plain if method.decided else self.answer()
        self.count = self.method.count(self.model, sites(self.model, example))
        self.tuning = attach(self.model, self.method, example=example)
        self.start = self.answer()
        self._first = [parameter.detach().clone() for parameter in self.tuning.parameters()]
        self._by, self._answers = 0.0, {0.0: self.start}

    def _decide(self, model: nn.Module, method: Method) -> Method:
        return method.resolve(model, [self.batch], lambda scored, batch: weigh(self.read(call(scored, batch))).square())

    # -- answers ------------------------------------------------------------------------------------------------

    def run(self, model: nn.Module | None = None, batch: Any = None) -> Tensor:
        """What a model (by default the tuned one) answers to a batch, with gradients."""
        return self.read(call(self.model if model is None else model, self.batch if batch is None else batch))

    @torch.no_grad()
    def answer(self, model: nn.Module | None = None) -> Tensor:
        """Without gradients: with them, attention picks its kernel by whether a bias trains, and bits differ."""
        return self.run(model)

    def move(self, by: float) -> None:
        """Every trainable tensor away from its start by noise of this size; 0 is the start itself."""
        if by == self._by:
            return
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter, start in zip(self.tuning.parameters(), self._first, strict=True):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                parameter.copy_(start + noise * by)
        self._by = by

    @property
    def tuned(self) -> Tensor:
        """The answer where the tensors are now."""
        if self._by not in self._answers:
            self._answers[self._by] = self.answer()
        return self._answers[self._by]

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of every trainable tensor; zeros for what is not in the loss."""
        named = dict(self.tuning.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(named, found))

    def halves(self) -> tuple[Any, Any]:
        """The batch in two; what has not one row a sample goes into both.

        Raises:
            NotApplicable: fewer than two rows, or the base mixes them.
        """
        rows = len(self.plain)

        def half(index: int) -> Any:
            return tree_map(
                lambda t: t.chunk(2)[index] if isinstance(t, Tensor) and t.shape[:1] == (rows,) else t, batch
            )

        batch = dict(self.batch) if isinstance(self.batch, Mapping) else self.batch
        if rows < 2:
            raise NotApplicable(f"the batch has {rows} row; two are needed")
        if self.rows_apart is None:
            with use(self.model, None), torch.no_grad():
                parts = [self.run(batch=half(index)) for index in (0, 1)]
            self.rows_apart = sum(map(len, parts)) == rows and torch.allclose(
                torch.cat(parts), self.plain, atol=1e-4, rtol=1e-3
            )
        if not self.rows_apart:
            raise NotApplicable("the rows of the model's answer depend on one another; give `read` one that keeps them")
        return half(0), half(1)

    # -- comparisons --------------------------------------------------------------------------------------------

    def broken(self, where: str, expected: str, received: object) -> NoReturn:
        raise Broken(where, expected, str(received))

    def same(self, received: Tensor, expected: Tensor, what: str, where: str = "the model's answer") -> None:
        """Bit for bit."""
        if not torch.equal(dense(received), dense(expected)):
            self.broken(where, f"{what}, bit for bit", _difference(received, expected))

    def close(
        self,
        received: Tensor,
        expected: Tensor,
        what: str,
        where: str = "the model's answer",
        *,
        atol: float,
        rtol: float,
    ) -> None:
        """Up to rounding, as far as the model's type rounds."""
        loose = max(1.0, torch.finfo(self.plain.dtype).eps / torch.finfo(torch.float32).eps)
        if received.shape != expected.shape or not torch.allclose(
            received, expected, atol=atol * loose, rtol=rtol * loose
        ):
            self.broken(where, f"{what}, within {atol * loose:.0e}", _difference(received, expected))


def _difference(received: Tensor, expected: Tensor) -> str:
    if received.shape != expected.shape:
        return f"shape {tuple(received.shape)} in place of {tuple(expected.shape)}"
    difference = (dense(received).double() - dense(expected).double()).abs()
    return f"a difference of up to {float(difference.max()):.1e} in {int((difference != 0).sum())} entries"

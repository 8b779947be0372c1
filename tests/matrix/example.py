"""A tiny model of a family, a batch for it, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

BATCH = 4


def first(output: Any) -> Tensor:
    """The first floating tensor of an output, one row a sample."""
    values = list(output.values()) if isinstance(output, dict) else output
    return next(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())


class Example(NamedTuple):
    """`batch` is one tensor or keyword arguments; `read` must give rows that do not depend on one another."""

    model: nn.Module
    batch: Tensor | dict[str, Any]
    read: Callable[[Any], Tensor] = first

    def __call__(self, model: nn.Module | None = None, batch: Any = None) -> Tensor:
        """The answer of a model (by default the own one) to a batch."""
        model = self.model if model is None else model
        batch = self.batch if batch is None else batch
        return self.read(model(**batch) if isinstance(batch, dict) else model(batch))

    @torch.no_grad()
    def answer(self, model: nn.Module | None = None) -> Tensor:
        """Without gradients: with them, attention picks its kernel by whether a bias trains, and bits differ."""
        return self(model)

    def halves(self) -> list[Any]:
        """The batch in two; tensors without one row a sample go into both."""

        def half(index: int) -> Any:
            return tree_map(lambda t: t.chunk(2)[index] if len(t) == BATCH else t, self.batch)

        return [half(0), half(1)]


def enliven(model: nn.Module, scale: float = 1.0) -> None:
    """Values of their own for what starts at zero or one, so that no test passes on a zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.normal_(std=scale * parameter[0].numel() ** -0.5)

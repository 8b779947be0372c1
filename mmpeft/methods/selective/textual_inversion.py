"""Textual inversion: the embeddings of new words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from mmpeft.errors import ConfigError, expect
from mmpeft.methods.base import register
from mmpeft.methods.needs import Need
from mmpeft.methods.recipe import identity, positive, tensor_of
from mmpeft.methods.shared.tensors import TensorMethod
from mmpeft.sites import Site
from mmpeft.sites.selector import select


@register("https://arxiv.org/abs/2208.01618", "selective", mergeable=True)
@dataclass(frozen=True)
class TextualInversion(TensorMethod):
    """The last `words` rows of every table of words train: those that were added for new words, from where they start.

    Adding the rows is the tokenizer's and the model's business (`resize_token_embeddings`). A head tied to the table
    reads the same rows. `rows` names others than the last, of the tables or of what `at` selects. Parameters: `d` a
    row of a table.
    """

    words: int = 1
    rows: tuple[int, ...] = ()

    needs: ClassVar[tuple[Need, ...]] = (Need("a table of words", "embed", "embedding"),)

    def __post_init__(self) -> None:
        positive(self, words=self.words)
        object.__setattr__(self, "rows", tuple(self.rows))
        expect(all(row >= 0 for row in self.rows), self, "rows", self.rows, "indices from 0")

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        tables = {site.path for site in available if site.role == "embed" and site.kind == "embedding"}
        shared = {identity(model, f"{path}.weight") for path in tables}
        wanted = {site.path for site in select(available, self.at)} if self.at and self.rows else set()
        for site in available:
            if site.role != "param" or not (site.path in wanted or identity(model, site.path) in shared):
                continue
            count = len(tensor_of(model, site.path))
            if count < self.words or count <= max(self.rows, default=0):
                asked = f"rows up to {max(self.rows)}" if self.rows else f"words={self.words}"
                raise ConfigError(f"{site.path} has {count} rows, {asked}")
            runs = _runs(self.rows) if self.rows else [(count - self.words, count)]
            yield from (replace(site, rows=run) for run in runs)


def _runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Indices as slices, each as long as it can be."""
    found: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return found

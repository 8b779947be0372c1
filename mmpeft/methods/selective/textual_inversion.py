"""Textual inversion: the embeddings of new words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.methods.base import register
from mmpeft.methods.needs import Need
from mmpeft.methods.recipe import identity, positive, tensor_of
from mmpeft.methods.shared.tensors import TensorMethod
from mmpeft.sites import Site


@register("https://arxiv.org/abs/2208.01618", "selective", mergeable=True)
@dataclass(frozen=True)
class TextualInversion(TensorMethod):
    """The last `words` rows of every table of words train: those that were added for new words, from where they start.

    Adding the rows is the tokenizer's and the model's business (`resize_token_embeddings`). A head tied to the table
    reads the same rows. Parameters: `words d` a table.
    """

    words: int = 1

    needs: ClassVar[tuple[Need, ...]] = (Need("a table of words", "embed", "embedding"),)

    def __post_init__(self) -> None:
        positive(self, words=self.words)

    def tensors(self, model: nn.Module, available: list[Site]) -> Iterable[Site]:
        tables = {site.path for site in available if site.role == "embed" and site.kind == "embedding"}
        shared = {identity(model, f"{path}.weight") for path in tables}
        for site in available:
            if site.role == "param" and identity(model, site.path) in shared:
                tensor = tensor_of(model, site.path)
                if len(tensor) < self.words:
                    raise ConfigError(f"{site.path} has {len(tensor)} rows, words={self.words}")
                yield replace(site, rows=(len(tensor) - self.words, len(tensor)))

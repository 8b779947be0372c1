"""Which entries a sample uses: always decided for each sample alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.surgery.together import Entry as RouteEntry
from mmpeft.surgery.together import Together


@dataclass(frozen=True)
class Choice:
    """For each row of a batch its `k` best entries: `index` [B, k] into `ids`, similarities `score` [B, k]."""

    ids: tuple[str, ...]
    index: Tensor
    score: Tensor

    def names(self) -> list[tuple[str, ...]]:
        """The chosen entries of each row, best first."""
        return [tuple(self.ids[i] for i in row) for row in self.index.tolist()]

    def routes(self, *always: str) -> list[RouteEntry]:
        """What `mmpeft.use` takes: one entry a row, several of them `Together`, with those that `always` run."""
        found: list[RouteEntry] = []
        for row in self.names():
            names = (*always, *sorted(set(row) - set(always), key=self.ids.index))
            found.append(names[0] if len(names) == 1 else Together(names))
        return found


def nearest_keys(query: Tensor, keys: Mapping[str, Tensor], top: int = 1) -> Choice:
    """The entries whose keys have the greatest cosine with each row of `query` [B, d].

    An entry with several keys [n, d] counts by its best one. Rows are compared one by one in the same order of
    operations, whatever the rest of the batch is.

    Raises:
        ConfigError: no keys, more entries asked for than there are, or another width.
    """
    if not keys:
        raise ConfigError("no entry has keys to route by: set entry.learned['key'] or entry.state['key']")
    if not 1 <= top <= len(keys):
        raise ConfigError(f"top={top}, but {len(keys)} entries have keys: {', '.join(keys)}")
    for name, key in keys.items():
        if key.dim() != 2 or key.shape[1] != query.shape[-1]:
            raise ConfigError(
                f"the keys of {name!r} are {tuple(key.shape)}, a query is [{query.shape[-1]}] wide; keys are [n, d]"
            )
    own = F.normalize(query, dim=-1)
    scores = [(own[:, None] * F.normalize(key, dim=-1)).sum(-1).amax(1) for key in keys.values()]
    score, index = torch.stack(scores, 1).topk(top, dim=1)
    return Choice(tuple(keys), index, score)


def soft_weights(query: Tensor, focus: Tensor, keys: Tensor) -> Tensor:
    """`w[..., b, m] = cos(q_b ⊙ A_m, K_m)` for queries [B, d], A and K [..., M, d]; each row for itself.

    Soft in place of a choice: the weights of a `Mixture` (CODA-Prompt, arXiv:2211.13218). A says which features of the
    query count for a component; gradients flow to both.
    """
    if focus.shape != keys.shape or focus.shape[-1] != query.shape[-1]:
        raise ConfigError(
            f"expected A and K [..., M, {query.shape[-1]}] for queries {tuple(query.shape)}, got {tuple(focus.shape)} "
            f"and {tuple(keys.shape)}"
        )
    size = (query.square() @ focus.square().mT).sqrt() * keys.norm(dim=-1).unsqueeze(-2)
    weights: Tensor = query @ (focus * keys).mT / size.clamp_min(torch.finfo(size.dtype).tiny)
    return weights

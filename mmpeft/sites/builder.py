"""What anatomies share: collecting the sites of a model. No backbone is named here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from mmpeft.functional.rows import Rows
from mmpeft.hosting.host import base_value
from mmpeft.hosting.modules import module_at, own_modules
from mmpeft.sites.site import ROLES, Kind, Site
from mmpeft.types import AnyModule, Kwargs


@dataclass
class Builder:
    """Collects sites; `finish` adds what needs no family's knowledge: norms, head, embedding, other projections.

    Modules are recognised along their class hierarchy: in a tuned model a module's own class stands behind a
    subclass, and the parts of tunings hang under it.
    """

    model: nn.Module
    tower: str = ""
    sites: list[Site] = field(default_factory=list)
    blocks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Depth and tower of every block by path."""

    def module(self, path: str) -> nn.Module:
        return module_at(self.model, path)

    def add(self, path: str, role: str, depth: int = -1, **known: object) -> None:
        fields: Kwargs = {"tower": self.tower, **known}
        self.sites.append(Site(path, role, depth, **fields))

    def linear(self, path: str, role: str, depth: int = -1, **known: object) -> None:
        """A linear or convolution; one that stores its weight [i, o] is told by its class `Conv1D`."""
        module = self.module(path)
        kind: Kind = "conv" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "linear"
        if is_a(module, "Conv1D"):
            known["transposed"] = True
        self.add(path, role, depth, kind=kind, **known)

    def fused(self, path: str, roles: Sequence[str], sizes: Sequence[int], depth: int = -1, **known: object) -> None:
        """One projection that serves several roles, one behind the other, `sizes` rows each."""
        start = 0
        for role, size in zip(roles, sizes):
            self.linear(path, role, depth, rows=(start, start + size), **known)
            start += size

    def interleaved(self, path: str, roles: Sequence[str], period: int, depth: int = -1, **known: object) -> None:
        """One projection whose rows are periods (heads), each split evenly among the roles."""
        size = period // len(roles)
        for i, role in enumerate(roles):
            rows: Rows = (i * size, (i + 1) * size, period)
            self.linear(path, role, depth, rows=rows, **known)

    def multihead(self, path: str, roles: dict[str, str], depth: int = -1) -> None:
        """`nn.MultiheadAttention`, which calls none of its projections and reads all of their tensors.

        `roles` maps `q`, `k`, `v` and `out` to roles.
        """
        attention = self.module(path)
        assert isinstance(attention, nn.MultiheadAttention)
        self.in_projection(path, attention, roles, depth)
        out = f"{path}.out_proj"
        biased = attention.out_proj.bias is not None
        self.add(out, roles["out"], depth, kind="linear", via="weight", bias=f"{out}.bias" if biased else "")

    def in_projection(self, path: str, attention: nn.Module, roles: dict[str, str], depth: int) -> None:
        """Queries, keys and values of an attention that reads `in_proj_weight`, or one weight for each."""
        fused = attention._parameters.get("in_proj_weight")
        bias = f"{path}.in_proj_bias" if attention._parameters.get("in_proj_bias") is not None else ""
        for i, name in enumerate("qkv"):
            if fused is None:  # keys or values of another width
                known: dict[str, object] = {"tensor": f"{name}_proj_weight"}
            else:
                size = len(fused) // 3
                known = {"tensor": "in_proj_weight", "rows": (i * size, (i + 1) * size), "bias": bias}
            self.add(path, roles[name], depth, kind="linear", via="weight", **known)

    def block(self, path: str, depth: int, width: int, **known: object) -> None:
        self.blocks[path] = (depth, self.tower)
        self.add(path, "block", depth, width=width, **known)

    def finish(self, embed: Collection[str] = (), heads: Collection[str] = ()) -> list[Site]:
        """All sites in the model's order, of a module that runs several times once.

        `embed` and `heads` are paths of embeddings and of task heads.
        """
        covered = {site.path for site in self.sites}
        order: dict[str, int] = {}
        (depth, self.tower), block, around = (-1, self.tower), "", self.tower
        for path, module in self.modules():  # parents before children: a block's modules follow it
            order[path] = len(order)
            if path in self.blocks:
                (depth, self.tower), block = self.blocks[path], f"{path}."
            elif not (block and path.startswith(block)):
                depth, block, self.tower = -1, "", self.outside(path, around)
            if path not in covered and is_projection(module):
                role = "head" if path in heads else "embed" if path in embed else "proj"
                self.linear(path, role, depth)
            elif path not in covered and isinstance(module, nn.MultiheadAttention):
                self.multihead(path, dict.fromkeys(("q", "k", "v", "out"), "proj"), depth)
                covered |= {path, f"{path}.out_proj"}
            elif path in embed and isinstance(module, nn.Embedding):
                self.add(path, "embed", depth, kind="embedding", transposed=True, width=module.embedding_dim)
            elif path not in covered and is_norm(module):
                width = weight_shape(module)[0]
                self.add(path, "norm", depth, kind="norm", width=width, channel_dim=norm_channel(module))
        rank = {role: i for i, role in enumerate(ROLES)}
        once = {(site.path, site.role, site.tensor, site.rows): site for site in self.sites[::-1]}
        return sorted(once.values(), key=lambda site: (order[site.path], rank[site.role]))

    def outside(self, path: str, around: str) -> str:
        """The tower of a module outside every block."""
        return around

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules of the backbone, parts of tunings left out."""
        yield from own_modules(self.model)


def weight_shape(module: AnyModule) -> torch.Size:
    """The true shape of a module's weight, whatever parts read it quantised or not."""
    shape: torch.Size = base_value(module, "weight").shape
    return shape


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether a class of one of these names stands in a module's hierarchy."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution with a weight of its own."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_a(module, "Conv1D")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer with a weight; ConvNeXt-V2's response norm is none."""
    name = type(module).__name__.lower()
    return "norm" in name and "response" not in name and isinstance(module._parameters.get("weight"), nn.Parameter)


def norm_channel(module: nn.Module) -> int:
    """Where a norm's channels are: `LayerNorm2d`, batch and group norms work on `[B, C, H, W]`, others on the last."""
    name = type(module).__name__.lower()
    return 1 if name.endswith("2d") or "batchnorm" in name or "groupnorm" in name else -1

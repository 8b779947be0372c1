"""`Mixture`: prefixes of several tunings as one, composed anew for each row of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmpeft.errors import ConfigError, Refused
from mmpeft.parts.base import Hook, Part, Placement
from mmpeft.parts.prefix import MixedPrefix, Prefix
from mmpeft.surgery.together import Together


@dataclass(frozen=True, eq=False)
class Mixture(Together):
    """Each row's own keys and values: `P[b] = Σ_i Σ_m w_i[l, b, m] P_i[l, m]` at layer l.

    The `p` tokens of tuning i are read as M_i components of p / M_i tokens, side by side. Its weights w_i are a tensor
    [L, B, M_i], or [B, M_i] for all layers alike, of a batch of B rows; gradients flow to weights and components. So a
    batch is composed in one pass. In a route with an entry for each row, every entry has weights of one row.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = [tuple(w.shape) for w in self.weights or () if isinstance(w, Tensor)]
        if len(shapes) < len(self.names) or self.unit or {len(shape) for shape in shapes} - {2, 3}:
            raise ConfigError(f"Mixture expects weights [L, B, M] or [B, M] for each of {self.names}, got {shapes}")

    def hooks(self, tunings: Sequence[Sequence[Placement]]) -> Iterator[tuple[Hook, Part]]:
        """What runs in place of the parts of the tunings named, layer by layer.

        Raises:
            Refused: parts other than learned keys and values, or on other sites than the first tuning's.
            ConfigError: weights that do not fit them.
        """
        for name, own in zip(self.names, tunings, strict=True):
            for placement in own:
                if type(placement.part) is not Prefix:
                    raise Refused(f"a Mixture is one of learned keys and values; {name!r} has {placement.part}")
            if [p.hooks for p in own] != [p.hooks for p in tunings[0]]:
                raise Refused(f"{self.names[0]!r} and {name!r} tune other sites, so they cannot be one Mixture")
        for layer, placements in enumerate(zip(*tunings, strict=True)):
            parts = [p.part for p in placements if isinstance(p.part, Prefix)]
            mixed = MixedPrefix(parts, [self._at(layer, i, len(tunings[0])) for i in range(len(parts))])
            yield from ((hook, mixed) for hook in placements[0].hooks)

    def _at(self, layer: int, index: int, layers: int) -> Tensor:
        weight = (self.weights or ())[index]
        assert isinstance(weight, Tensor)
        if weight.dim() == 3 and len(weight) != layers:
            name = self.names[index]
            raise ConfigError(f"Mixture got weights {tuple(weight.shape)} for the {layers} layers of {name!r}")
        return weight[layer] if weight.dim() == 3 else weight

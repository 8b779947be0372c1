"""What a base is known by: a digest of it as it is, and a sketch that outlives a change of type and of bits."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError
from mmpeft.hosting.quantized import QuantizedWeight, dense
from mmpeft.parts.base import Placement
from mmpeft.parts.mask import Mask
from mmpeft.surgery.attaching import base_tensors
from mmpeft.types import Leaf

SAMPLE = 256
"""Elements of each base tensor that are looked at."""

STEP = 2.0**-14
"""Of the numbers in a sketch, which are in (-2, 2)."""

PACKED = -(2**15)
"""In a sketch, in place of a tensor quantised."""


@dataclass(frozen=True)
class Fingerprint:
    """A base by names, shapes and a sample of values, without the tensors that a tuning trains whole."""

    digest: str
    """Sixteen hex digits of all of it, values rounded to bfloat16."""
    layout: str
    """Sixteen hex digits of names and shapes."""
    sketch: str
    """For each tensor n, `Σ ±x / Σ |x|` and `log₂ (Σ |x| / n)` modulo 1, as 16-bit numbers in base64."""

    @classmethod
    def of(cls, model: nn.Module, placements: Iterable[Placement] = ()) -> Fingerprint:
        """That of a model that hosts these parts."""
        replaced = {
            f"{hook.path}.{hook.name}".lstrip(".")
            for placement in placements
            if isinstance(placement.part, Mask) and placement.part.rows is None
            for hook in placement.hooks
        }
        digest, layout, sketch = hashlib.sha256(), hashlib.sha256(), []
        for name, tensor in sorted(base_tensors(model), key=lambda pair: pair[0]):
            if name not in replaced:
                label = f"{name}{tuple(tensor.shape)}".encode()
                flat = dense(tensor).detach().flatten()
                sample = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].cpu()
                digest.update(label)
                digest.update(sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
                layout.update(label)
                sketch.append(_packed() if isinstance(tensor, QuantizedWeight) else _sketch(sample))
        numbers = torch.stack(sketch) if sketch else torch.empty(0, dtype=torch.int16)
        held = base64.b64encode(numbers.numpy().tobytes()).decode()
        return cls(digest.hexdigest()[:16], layout.hexdigest()[:16], held)

    @classmethod
    def read(cls, facts: Leaf) -> Fingerprint:
        """From a manifest; what an older one lacks is empty.

        Raises:
            AdapterFileError: no text, or a sketch that is no whole numbers.
        """
        facts = {"fingerprint": facts} if isinstance(facts, str) else facts
        try:
            found = cls(facts["fingerprint"], facts.get("layout", ""), facts.get("sketch", ""))
            if not all(isinstance(text, str) for text in (found.digest, found.layout, found.sketch)):
                raise TypeError(f"expected text, got {found}")
            _numbers(found.sketch)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise AdapterFileError(f"the base's fingerprint is damaged: {error!r}") from error
        return found

    def facts(self) -> dict[str, str]:
        """For a manifest."""
        return {"fingerprint": self.digest, "layout": self.layout, "sketch": self.sketch}

    def fits(self, other: Fingerprint) -> bool:
        """Whether both are of one base, whatever types and bits its tensors are held in.

        What either holds quantised is compared by name and shape alone, all else by the sketch, to a few times what
        rounding n values to bfloat16 changes.
        """
        if self.digest == other.digest:
            return True
        if not self.layout or self.layout != other.layout:
            return False
        own, its = _numbers(self.sketch), _numbers(other.sketch)
        if own.shape != its.shape:
            return False
        known = (own[:, 0] != PACKED) & (its[:, 0] != PACKED)
        count, signed, size = (own - its)[known].abs().unbind(1)
        size = torch.minimum(size, round(1 / STEP) - size)  # of two logarithms modulo 1
        rounding = 1 / STEP / own[known][:, 0].clamp(min=1).sqrt()
        near = (signed <= 2.0**-7 * rounding + 2) & (size <= 2.0**-6 * rounding + 2)
        return bool((near & (count == 0)).all())


def _sketch(sample: Tensor) -> Tensor:
    """The three numbers of a tensor, int16."""
    wide = sample.double()
    total = wide.abs().sum()
    if not torch.isfinite(total) or total == 0:
        return torch.tensor([len(sample), 0, 0], dtype=torch.int16)
    numbers = torch.stack([(wide * _signs(len(sample))).sum() / total, (total / len(sample)).log2() % 1])
    return torch.cat([torch.tensor([len(sample)]), (numbers / STEP).round()]).to(torch.int16)


@cache
def _signs(count: int) -> Tensor:
    """Random ones and minus ones, the same for every tensor of so many elements in its sample."""
    return torch.randint(2, (count,), generator=torch.Generator().manual_seed(count), device="cpu").double() * 2 - 1


def _packed() -> Tensor:
    return torch.tensor([PACKED] * 3, dtype=torch.int16)


def _numbers(sketch: str) -> Tensor:
    raw = bytearray(base64.b64decode(sketch, validate=True))
    return torch.frombuffer(raw, dtype=torch.int16).view(-1, 3).int() if raw else torch.empty(0, 3, dtype=torch.int32)

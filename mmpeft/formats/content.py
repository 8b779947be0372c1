"""What an adapter file holds, whatever its format, and the only way such a file is opened."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmpeft.errors import AdapterFileError
from mmpeft.files import check_file, read_file
from mmpeft.formats.peft_experts import StackTensors
from mmpeft.hosting.values import finite, unfit
from mmpeft.types import Facts, Json

MOST_JSON, MOST_TENSORS = 2**26, 2**46
"""Bytes of a manifest or config, and of a file of tensors, whose content is mapped and not read at once."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Layer:
    """A low-rank update of one module: `ΔW = s · up · down`, `s = alpha / r` (1 without alpha).

    `down` is [r, i] or, for a convolution, [r, i, k...]; `up` is [o, r]; `magnitude` [o] makes it a DoRA update
    `m ⊙ (W + ΔW) / ‖W + ΔW‖`. `path` names the module in the base model; with `flat` its dots are written as
    underscores, so that only the model can tell them apart. `component` says which model of a pipeline it is.
    `transposed` marks a base weight stored as [i, o]; so is the table of an embedding (`lookup`), [words, d].
    `factor` names what the file holds instead of the two halves, where that is another factor of the same ΔW, and
    `tensors` are those of it that are to be written, scale baked in, by LyCORIS's names.
    """

    path: str
    down: Tensor
    up: Tensor
    alpha: float | None = None
    magnitude: Tensor | None = None
    component: str = ""
    flat: bool = False
    transposed: bool = False
    lookup: bool = False
    factor: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def baked(self, alpha: float = 0.0) -> Layer:
        """The same update with its scale in `up`, for alpha = r or the alpha given: all consumers read it alike."""
        alpha = alpha or float(self.rank)
        factor = self.scale * self.rank / alpha
        if factor == 1.0:
            return replace(self, alpha=alpha)
        up = self.up.float() * factor
        narrow = up.to(self.up.dtype)
        return replace(self, up=narrow if torch.equal(narrow.float(), up) else up, alpha=alpha)

    def padded(self, rank: int) -> Layer:
        """The same update with zeros up to a rank, at the same scale."""
        more = rank - self.rank
        if more == 0:
            return self
        down = torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])])
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), more)], 1)
        return replace(self, down=down, up=up, alpha=self.scale * rank)

    def trimmed(self) -> Layer:
        """The same update without what is zero in both halves: nothing, and what never trains."""
        keep = (self.up != 0).any(0) | (self.down != 0).flatten(1).any(1)
        if keep.all():
            return self
        keep[0] |= not keep.any()
        return replace(self, down=self.down[keep], up=self.up[:, keep], alpha=self.scale * int(keep.sum()))


@dataclass(frozen=True)
class Shift:
    """A full difference of a bias, or of a norm's weight: `b + value`. Names as in `Layer`."""

    path: str
    tensor: Literal["weight", "bias"]
    value: Tensor
    component: str = ""
    flat: bool = False


@dataclass(frozen=True)
class Based:
    """An update of a weight that depends on the weight itself (OFT, GLoRA, …): only a model tells its ΔW."""

    path: str
    kind: str
    tensors: Mapping[str, Tensor]
    component: str = ""
    flat: bool = False


@dataclass(frozen=True)
class Scaling:
    """(IA)³: a vector on the input or the output of one module."""

    path: str
    gamma: Tensor
    side: Literal["input", "output"]
    transposed: bool = False


@dataclass(frozen=True)
class Learned:
    """Learned embeddings [p, d], or the keys and values of all layers [p, 2 L h d], and what PEFT's config says."""

    kind: str
    tensor: Tensor
    config: Facts


@dataclass(frozen=True)
class Content:
    """A whole adapter: updates, scalings or learned tokens, and beside them modules saved whole (a new head)."""

    format: str
    layers: list[Layer] = field(default_factory=list)
    scalings: list[Scaling] = field(default_factory=list)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Module path → its tensors by name."""
    dropout: float = 0.0
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    """Those of the notes on which readers differ: they are said when the file is loaded."""
    targets: str | tuple[str, ...] = ()
    """The modules that the file says it is for, as PEFT names them; empty where it does not say."""
    modules: tuple[str, ...] = ()
    """Names of modules that the file says it saves whole, where the model has them."""
    learned: Learned | None = None
    stacks: StackTensors | None = None
    """Updates of the stacked weights of experts."""
    base: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the base by name, of which the file has values of its own: trained biases, a table of words."""
    words: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    """Module path → rows of its table, and their values (`trainable_token_indices`)."""
    others: dict[str, str] = field(default_factory=dict)
    """Module path → the factor (LoHa, LoKr, …) that is recognised and cannot be loaded."""
    shifts: list[Shift] = field(default_factory=list)
    """Biases inside updates (PEFT's `lora_bias`) are some."""
    based: list[Based] = field(default_factory=list)
    """What becomes layers or shifts once a model is given."""
    unread: tuple[str, ...] = ()
    """Keys that are no part of an adapter of any known kind, beside others that are."""

    @property
    def beside(self) -> str:
        """What there is beside updates of weights, in words; empty for nothing."""
        kinds = {
            "(IA)³ vectors": self.scalings,
            "whole modules": self.whole,
            "tensors of the base": self.base,
            "rows of tables": self.words,
        }
        return " and ".join(name for name, held in kinds.items() if held)

    @property
    def method(self) -> str:
        """`LoRA`, `DoRA`, `IA3`, or what else the layers are, joined by `+`."""
        names = {layer.factor or ("LoRA" if layer.magnitude is None else "DoRA") for layer in self.layers}
        names |= {"LoRA"} if self.stacks else set()
        names |= set(self.others.values()) | ({"IA3"} if self.scalings else set())
        names |= {self.learned.kind} if self.learned else set()
        names |= {item.kind for item in self.based} | ({"differences"} if self.shifts else set())
        names |= {"TextualInversion"} if self.words else set()
        return "+".join(sorted(names)) or "none"

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the base and of modules saved whole, by name."""
        return self.base | {f"{path}.{name}": t for path, own in self.whole.items() for name, t in own.items()}

    def check(self, where: object) -> None:
        """Raise AdapterFileError for what reading has made infinite: products of factors, scales of their alpha."""
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            if not finite(layer.scale):
                raise AdapterFileError(f"{where}: {layer.path} has the scale {layer.scale} (alpha {layer.alpha})")
            halves = {"down": layer.down, "up": layer.up, "magnitude": layer.magnitude}
            found.update({f"{layer.path}.{name}": t for name, t in halves.items() if t is not None})
        found.update({scaling.path: scaling.gamma for scaling in self.scalings})
        found.update({f"{x.path}.{x.tensor}": x.value for x in self.shifts})
        found.update({**self.tensors(), **{path: rows for path, (_, rows) in self.words.items()}})
        found.update(self.stacks.tensors() if self.stacks else {})
        found.update({self.learned.kind: self.learned.tensor} if self.learned else {})
        check_values(found, where)

    @property
    def components(self) -> dict[str, int]:
        """How many layers each model of a pipeline has here; the empty name where a file names none."""
        return dict(Counter(item.component for item in self.named))

    @property
    def named(self) -> list[Layer | Shift | Based]:
        """All that is of one module of one model."""
        return [*self.layers, *self.shifts, *self.based]

    def of(self, components: Collection[str]) -> Content:
        """The part for one model, whose components these are."""
        found = replace(self, layers=[x for x in self.layers if x.component in components])
        found = replace(found, shifts=[x for x in self.shifts if x.component in components])
        return replace(found, based=[x for x in self.based if x.component in components])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        AdapterFileError: missing, pickled, truncated, empty, or with values that are not finite.
    """
    if path.suffix in PICKLED:
        raise AdapterFileError(
            f"{path} is a pickled file; reading it would run code it holds. Save it as .safetensors with the tool "
            "that wrote it"
        )
    if path.suffix != ".safetensors":
        raise AdapterFileError(f"expected a .safetensors file, got {path}")
    check_file(path, MOST_TENSORS, AdapterFileError)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise AdapterFileError(
            f"{path} is no safetensors file, or only a part of one ({size:,} bytes): {error}"
        ) from error
    if not tensors:
        raise AdapterFileError(f"{path} holds no tensor")
    check_values(tensors, path)
    return tensors, metadata


def check_values(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise AdapterFileError for the first tensor whose values no adapter can have.

    What one number says (alpha) may be written as a whole number; everything else is trained, in at least 32 bits.
    """
    for key, tensor in tensors.items():
        whole = tensor.numel() == 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool
        why = unfit(tensor, torch.int64 if whole else torch.float32)
        if why:
            raise AdapterFileError(f"{where}: {key} {why}")


def dump_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on nothing but its content; the library shuffles its metadata."""
    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, dict(metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    text = json.dumps(header | {"__metadata__": dict(sorted(metadata.items()))}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def read_json(path: Path) -> Json:
    """A JSON object.

    Raises:
        AdapterFileError: not JSON, or no object.
    """
    try:
        return parse_object(read_file(path, MOST_JSON, AdapterFileError).decode("utf-8"))
    except AdapterFileError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no JSON object, or only a part of one: {error}") from error


def parse_object(text: str) -> Json:
    """A JSON object from text, every number in it finite. Raises ValueError, or RecursionError for a bottomless one."""
    value = json.loads(text, parse_constant=_number, parse_float=_number)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def _number(text: str) -> float:
    """A number as JSON writes one; Python would also read NaN, Infinity and 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def assemble(slots: Mapping[str, Tensor], path: str, where: Path) -> Layer:
    """A `Layer` from its tensors (`down`, `up`, perhaps `alpha` and `magnitude`), in any of the files' shapes.

    Raises:
        AdapterFileError: a half is missing, or the shapes do not belong together.
    """
    missing = [name for name in ("down", "up") if name not in slots]
    if missing:
        raise AdapterFileError(
            f"{where}: {path} has {' and '.join(sorted(slots))} but no {missing[0]} projection; the file is a part"
        )
    down, up = slots["down"], slots["up"]
    if down.dim() < 2 or up.dim() < 2 or up[0, 0].numel() != 1 or up.shape[1] != len(down) or not len(down):
        raise AdapterFileError(
            f"{where}: {path} has down {tuple(down.shape)} and up {tuple(up.shape)}; expected [r, i, ...] and [o, r] "
            "of the same rank r"
        )
    alpha = slots.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise AdapterFileError(f"{where}: {path} has an alpha of shape {tuple(alpha.shape)}; expected one number")
    magnitude = slots.get("magnitude")
    if magnitude is not None:
        if magnitude.numel() != len(up):
            raise AdapterFileError(
                f"{where}: {path} has a DoRA magnitude of shape {tuple(magnitude.shape)}; expected one length for each "
                f"of {len(up)} output rows (lengths of input columns, as LyCORIS can write, are another method)"
            )
        magnitude = magnitude.flatten()
    return Layer(path, down, up.flatten(1), None if alpha is None else float(alpha), magnitude)

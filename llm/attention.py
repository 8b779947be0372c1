"""How learned keys and values enter transformers' attention: through its own registry of attention functions.

An attention module asks its `config` which function to call. While a part is in use, the module (and no other)
sees a config that names this one, which extends keys, values and mask and calls the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.functional.attention import prefix_mask
from mmpeft.hosting.forward import plan_of
from mmpeft.hosting.host import base_value, original_class
from mmpeft.parts.gate import GatedKeys
from mmpeft.parts.prefix import GatedPrefix
from mmpeft.parts.prompt import PromptLayer
from mmpeft.types import AnyFunc, Argument, Config, Kwargs, Output

NAME = "mmpeft"
Mask: TypeAlias = Any
"""None, a tensor, or one of flex attention's block masks, which take seconds to import."""
EXTENDED = "_mmpeft_extended"
"""Where a block mask keeps the longer ones made of it: every layer of a pass asks for the same."""


class _Config:
    """A module's config that names another attention function."""

    _attn_implementation = NAME

    def __init__(self, base: Config) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def view(module: nn.Module, config: Config, part: object) -> Config:
    """What the attention module reads as its config."""
    _register()
    return _Config(config)


@cache
def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def consults(module: nn.Module) -> bool:
    """Whether an attention asks the registry for its function, by the code that its library wrote."""
    if "config" not in module.__dict__:
        return False
    cls: type = original_class(module)  # mypy takes a type[Module] for unhashable
    return any(type(value).__name__ == "AttentionInterface" for value in _globals_used(cls))


@cache
def _globals_used(cls: type) -> tuple[object, ...]:
    """Global values that a class's methods name, those of functions and classes of the same file included."""
    found: dict[int, object] = {}
    pending: list[object] = [cls]
    while pending:
        value = pending.pop()
        if id(value) in found:
            continue
        found[id(value)] = value
        if isinstance(value, type):
            pending += [f for c in value.__mro__ if c not in (nn.Module, object) for f in vars(c).values()]
        function = getattr(value, "__wrapped__", value)
        if isinstance(function, FunctionType):
            own = function.__globals__
            named = [own[n] for code in _codes(function.__code__) for n in code.co_names if n in own]
            here = [v for v in named if not callable(v) or getattr(v, "__module__", "") == function.__module__]
            pending += [v for v in here if not isinstance(v, type)]
    return tuple(found.values())


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **options: Argument
) -> tuple[Tensor, Output]:
    """The module's own attention function on keys and values with every part's in front.

    `query` is [B, H, n, d], `key` and `value` [B, h, m, d] with what the cache holds.

    Raises:
        Refused: the function has no way to see further keys (packed texts, windows by position, chosen keys).
    """
    parts = _parts(module)
    name = str(base_value(module, "config")._attn_implementation or "eager")
    function: Callable[..., tuple[Tensor, Output]] = _original(module, name)
    beside = [part for part in parts if isinstance(part, GatedPrefix)]
    gated = [part for part in parts if isinstance(part, GatedKeys)]

    def with_(front: list[Any]) -> tuple[Tensor, Output]:
        keys, values = key, value
        seen: list[tuple[int, Tensor | None]] = []
        for part in front:
            if isinstance(part, PromptLayer):
                part.record(key, value)
            length = keys.shape[2]
            keys, values = part.extend(keys, values)
            if keys.shape[2] > length:
                window = options.get("sliding_window", getattr(module, "sliding_window", None))
                visible = part.visible(query.shape[2], window, query.device) if isinstance(part, PromptLayer) else None
                seen.insert(0, (keys.shape[2] - length, visible))
        if not seen:
            return function(module, query, keys, values, attention_mask, **options)
        count = sum(size for size, _ in seen)
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = _extended(name, attention_mask, causal, query, key.shape[2], count)
        if any(visible is not None for _, visible in seen):
            columns = [v if v is not None else query.new_ones(query.shape[2], n, dtype=torch.bool) for n, v in seen]
            mask = _hidden(name, mask, torch.cat(columns, dim=1), keys.shape[2])
        own = _own_options(name, options, query, key.shape[2], count)
        return function(module, query, keys, values, mask, **own)

    front = [part for part in parts if part not in beside and part not in gated]
    output, weights = with_(front)
    for keys in gated:
        output = keys.interpolate(output, with_([*front, keys])[0])
    for prefix in beside:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        output = output + prefix.beside(query, scaling).to(output.dtype)
    return output, weights


def _parts(module: nn.Module) -> tuple[Any, ...]:
    """The parts that the present route puts at an attention."""
    return plan_of(module).reads["config"]


def _original(module: nn.Module, name: str) -> AnyFunc:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    home = sys.modules[original_class(module).__module__]
    found: AnyFunc = ALL_ATTENTION_FUNCTIONS.get_interface(name, getattr(home, "eager_attention_forward", None))
    return found


def _extended(name: str, mask: Mask, causal: bool, query: Tensor, length: int, count: int) -> Mask:
    """A mask under which every query sees the keys in front: of padding [B, m], scores [B, 1, n, m], blocks, or none.

    No mask means what it means to the function: all keys to eager and flex attention, the triangle from the first
    key on (that of `scaled_dot_product_attention`) to the others where `causal`, and flash attention makes its own.
    """
    if type(mask).__name__ == "BlockMask":  # by name: to import flex attention takes seconds
        return _longer_blocks(mask, count)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return F.pad(mask, (count, 0), value=1)
    if mask is not None and not isinstance(mask, Tensor):
        raise Refused(f"prefixes do not know masks of type {type(mask).__name__}; load the model with sdpa or eager")
    rows = query.shape[2]
    if mask is None and (rows == 1 or not causal or _flash(name) or name.endswith(("eager", "flex_attention"))):
        return None
    longest = length if mask is None else max(length, mask.shape[-1])  # a function may cut a mask to its keys
    longer = prefix_mask(mask, mask is None, count, rows, longest, query.device)
    return longer if longer is None or longer.dim() == 4 else longer[None, None]


def _longer_blocks(mask: Mask, count: int) -> Mask:
    """A block mask with `count` keys in front that every query sees; made once for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    made: dict[int, Mask] = mask.__dict__.setdefault(EXTENDED, {})
    if count not in made:
        inner = mask.mask_mod

        def longer(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            visible: Tensor = (kv < count) | inner(b, h, q, (kv - count).clamp(min=0))
            return visible

        batch, heads = mask.kv_num_blocks.shape[:2]
        rows, length = mask.seq_lengths
        device = mask.kv_num_blocks.device
        made[count] = create_block_mask(longer, batch, heads, rows, length + count, device=str(device))
    return made[count]


def _hidden(name: str, mask: Mask, columns: Tensor, length: int) -> Mask:
    """Take keys in front out of some queries' sight: `columns` [n, p] is true for those seen."""
    rows, count = columns.shape
    if mask is None and not _flash(name):
        mask = columns.new_ones(1, 1, rows, length)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise Refused(
            f"a prompt and a sliding window that is shorter than the text: {name} cannot hide the prompt from later "
            "words; load the model with sdpa or eager"
        )
    mask = mask.expand(-1, -1, rows, -1)
    low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.cat([mask[..., :count].masked_fill(~columns, low), mask[..., count:]], dim=-1)


def _own_options(name: str, options: Kwargs, query: Tensor, length: int, count: int) -> Kwargs:
    """What the function is told besides, for longer keys.

    Raises:
        Refused: an option names keys by number, or a window by distance that keys in front would fall out of.
    """
    bias = options.get("position_bias")
    if bias is not None:
        options = {**options, "position_bias": F.pad(bias.expand(*bias.shape[:-1], length), (count, 0))}
    chosen = [n for n, v in options.items() if "indices" in n and isinstance(v, Tensor)]
    why = f"{chosen[0]} chooses keys by their number" if chosen else ""
    if _flash(name):
        window, positions = options.get("sliding_window"), options.get("position_ids")
        if window is not None and length + count > window:
            why = f"keys in front fall out of its sliding window of {window}"
        if any(options.get(n) is not None for n in ("cu_seq_lens_q", "cu_seq_lens_k")):
            why = "the lengths of packed texts are those without keys in front"
        if isinstance(positions, Tensor) and len(query) == 1 and bool((positions.diff(dim=-1) != 1).any()):
            why = "several texts are packed in one row"
    if why:
        raise Refused(f"{name} with learned keys in front: {why}; load the model with sdpa or eager, or unpacked")
    return options


def _flash(name: str) -> bool:
    return "flash" in name

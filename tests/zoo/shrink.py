"""A transformers config made small by the names and relations of its numbers, sub-configs included.

Widths of one tree are ranked and replaced by multiples of 32 in the same order: what was equal stays equal (a
projector's input and the tower's output) and what differed still differs (intermediate and hidden), so that roles
are not confused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from itertools import cycle, islice
from typing import Any

from transformers import PreTrainedConfig

from tests.zoo.given import AS_IS, GIVEN, START
from tests.zoo.names import (
    CHOSEN_COUNTS,
    EXPERT_COUNTS,
    EXPERTS,
    FIXED,
    HEAD_COUNTS,
    HEAD_WIDTH,
    HEADS,
    KEY_VALUE_HEADS,
    LAYER_COUNTS,
    LAYERS,
    MORE_WIDTHS,
    NO_WIDTH,
    PLACES,
    POSITION_COUNTS,
    POSITIONS,
    QUERY_COUNTS,
    SCANS,
    TOKENS,
    VOCABULARIES,
    WHERE_NONE,
    WIDTH,
    WIDTH_OF_TEXT,
)

_BASE = {f.name for f in fields(PreTrainedConfig)}


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and all those below it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _each(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_width(name: str, value: Any) -> bool:
    if name in MORE_WIDTHS:
        return bool(list(_numbers(value)))
    if HEAD_WIDTH.search(name) or NO_WIDTH.search(name) or not WIDTH.search(name):
        return False
    found = list(_numbers(value))
    return bool(found) and all(n >= 16 for n in found)


def _read(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """An attribute; of one that varies over the layers, what the whole has."""
    try:
        return getattr(config, name, default)
    except Exception:  # an error of its own kind that says so
        return vars(config).get(name, default)


def own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a config's own class declares, with the values of this instance."""
    names = [f.name for f in fields(type(config)) if f.name not in _BASE or "token" in f.name]
    return {name: _read(config, name) for name in names}


def _usual(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config as its class makes it, with what it is started with where its own defaults contradict each other."""
    try:
        return kind()
    except Exception:  # of several kinds, by the check that fails
        return kind(**START.get(kind.model_type, {}))


def _explicit(config: PreTrainedConfig) -> dict[str, Any]:
    """What the config above wrote into this one."""
    fresh = _usual(type(config))
    own = own_fields(config).items()
    kept = {k: v for k, v in own if not isinstance(v, PreTrainedConfig) and v != _read(fresh, k)}
    for name in ("_out_indices", "_out_features"):  # one of them settles the other
        kept.pop(name, None)
    for name, value in vars(config).items():  # what no field declares
        if name not in vars(fresh) and not name.startswith("_") and not isinstance(value, PreTrainedConfig):
            kept[name] = value
    if _read(config, "out_indices") != _read(fresh, "out_indices"):
        kept["out_indices"] = list(config.out_indices)
    return kept


class Shrinking:
    """The small numbers that stand for the large ones in one tree of configs."""

    def __init__(self, whole: PreTrainedConfig, given: dict[str, dict[str, Any]]) -> None:
        self.given = given
        widths: set[int] = set()
        kept: set[int] = set()
        vocabularies: set[int] = set()
        tokens: set[int] = set()
        for config in configs(whole):
            for name, value in own_fields(config).items():
                if _is_width(name, value):
                    widths |= set(_numbers(value))
                    kept |= set(_numbers(value)) if config.model_type in AS_IS else set()
                elif VOCABULARIES.search(name):
                    vocabularies |= {n for n in _numbers(value) if n > 400}
                elif TOKENS.search(name):
                    tokens |= {n for n in _numbers(value) if n >= 100}
        self.widths = {n: n if n in kept else 32 * (i + 2) for i, n in enumerate(sorted(widths))}
        self.vocabularies = {n: 400 + 8 * i for i, n in enumerate(sorted(vocabularies))}
        self.tokens = {n: 100 + i for i, n in enumerate(sorted(tokens))}

    def small(self, config: PreTrainedConfig, text_width: int | None = None) -> PreTrainedConfig:
        """The config with its numbers replaced; `text_width` is what a tower beside the text has to give."""
        kwargs = _explicit(config) if config.model_type in AS_IS else self._kwargs(config)
        for name in WIDTH_OF_TEXT:
            if text_width and getattr(config, name, None):
                kwargs[name] = text_width
        given = self.given.get(config.model_type) or self.given.get(type(config).__name__, {})
        for name, value in given.items():
            kwargs[name] = (
                value({**kwargs, "text_width": text_width, "widths": self.widths}) if callable(value) else value
            )
        text = next((c for n in ("text_config", "llm_config") if (c := getattr(config, n, None)) is not None), None)
        width = self.small(text).hidden_size if hasattr(text, "hidden_size") else None  # type: ignore[union-attr]
        for name, value in vars(config).items():
            if isinstance(value, PreTrainedConfig) and name not in kwargs:
                kwargs[name] = self.small(value, width)
        return type(config)(**kwargs)

    def _kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        own = own_fields(config)
        before = max((v for n, v in own.items() if LAYER_COUNTS.search(n) and isinstance(v, int)), default=0)
        kinds = max((len(set(v)) for n, v in own.items() if self._one_a_layer(v, before)), default=1)
        layers = max(LAYERS, 2 * kinds)
        new = _explicit(config)
        if "out_indices" in new and before:
            new["out_indices"] = self._places(new["out_indices"], before, layers)
        for name, value in own.items():
            changed = self._change(name, value, own, before, layers)
            if changed is not MISSING:
                new[name] = changed
        heads = new.get("num_attention_heads") or new.get("n_head") or new.get("num_heads") or HEADS
        self._heads_fit(own, new, heads)
        for many, width, expand in SCANS:
            if isinstance(own.get(many), int) and isinstance(own.get(width), int) and own.get(expand):
                whole = int(own[expand] * new["hidden_size"])
                new.update(
                    {many: HEADS, width: whole // HEADS}, **({"mamba_d_ssm": whole} if own.get("mamba_d_ssm") else {})
                )
        rotation = own.get("rope_parameters")
        if isinstance(rotation, dict) and rotation.get("rope_theta", 0) is None:
            new["rope_parameters"] = rotation = {**rotation, "rope_theta": 10000.0}
        if isinstance(rotation, dict) and "mrope_section" in (
            getattr(config, "ignore_keys_at_rope_validation", None) or ()
        ):
            new["rope_parameters"] = {**rotation, "mrope_section": _sections(rotation, new, heads)}
        return new

    @staticmethod
    def _one_a_layer(value: Any, layers: int) -> bool:
        return isinstance(value, list | tuple) and len(value) == layers > 4 and all(isinstance(v, str) for v in value)

    def _change(self, name: str, value: Any, own: dict[str, Any], before: int, layers: int) -> Any:
        if value is None:
            return WHERE_NONE.get(name, MISSING)
        if isinstance(value, PreTrainedConfig | dict | bool) and name not in FIXED:
            return MISSING
        if name == "num_kv_shared_layers" and value == before:  # of one that assists: all
            return layers
        if name in FIXED:
            fixed = FIXED[name]
            return fixed if isinstance(value, int) and (value or isinstance(fixed, bool)) else MISSING
        if isinstance(value, list | tuple) and len(value) == before > 4:
            return _pattern(name, list(value), layers)
        if TOKENS.search(name) and not PLACES.search(name.replace("token_index", "").replace("token_ids", "")):
            return _each(value, lambda n: self.tokens.get(n, n))
        if VOCABULARIES.search(name):
            return _each(value, lambda n: self.vocabularies.get(n, n))
        if EXPERT_COUNTS.search(name):
            return _each(value, lambda n: min(n, EXPERTS))
        if CHOSEN_COUNTS.search(name):
            return _each(value, lambda n: min(n, 2))
        if POSITION_COUNTS.search(name):
            return _each(value, lambda n: min(n, POSITIONS))
        if QUERY_COUNTS.search(name):
            return min(value, 12)
        if name == "codebook_size":  # a power of two in most codecs
            return min(value, 64)
        if name == "window_size" and isinstance(value, int):
            return 2 if value <= 32 and ("patch_size" in own or "embed_dim" in own) else value
        if HEAD_COUNTS.search(name) and "dim" not in name:
            few = KEY_VALUE_HEADS if re.search(r"kv|key", name) and not own.get("kv_lora_rank") else HEADS
            return _each(value, lambda n: max((d for d in (1, 2, 4) if d <= min(n, few)), default=n))
        if isinstance(value, int) and LAYER_COUNTS.search(name):
            return layers if value == before else min(value, LAYERS if value > 4 else 2)
        if name in ("depths", "num_blocks", "stage_num_blocks", "blocks_per_stage", "layer_depths", "num_layers"):
            return _each(value, lambda n: min(n, 2))
        if _is_width(name, value):
            return _each(value, self.widths.__getitem__)
        if PLACES.search(name) and before:
            return self._places(value, before, layers)
        return self._picture(name, value, own)

    @staticmethod
    def _places(value: Any, before: int, layers: int) -> Any:
        """Indices of layers, at the same share of the depth."""
        found = list(_numbers(value))
        if not found or before <= layers or any(abs(n) > before for n in found):
            return value
        after = before in found  # they count what follows each layer, and the stem
        top, end = (before, layers) if after else (before - 1, layers - 1)

        def move(n: int) -> int:
            return -min(-n, layers) if n < 0 else round(n * end / top)

        if isinstance(value, int):
            return move(value)
        moved = [move(n) for n in found]
        if len(set(moved)) < len(found) <= end + 1 and min(found) >= 0:
            moved = list(range(end + 1 - len(found), end + 1))
        return list(dict.fromkeys(moved))

    @staticmethod
    def _picture(name: str, value: Any, own: dict[str, Any]) -> Any:
        """Four patches along each side."""
        if name not in ("image_size", "img_size", "pretrain_image_size"):
            return MISSING
        patch = own.get("patch_size") or own.get("patch_stride")
        staged = isinstance(own.get("depths") or own.get("hidden_sizes") or own.get("num_blocks"), list | tuple)
        if isinstance(patch, list | tuple):
            patch = patch[0]
        side = 64 if staged or not isinstance(patch, int) or patch > 64 else max(4 * patch, 16)
        side = 128 if isinstance(patch, int) and patch < 4 else side
        return _each(value, lambda n: min(n, side))

    @staticmethod
    def _heads_fit(own: dict[str, Any], new: dict[str, Any], heads: Any) -> None:
        """Widths of a head: a share of the hidden width where they were one."""
        for name, value in own.items():
            if not HEAD_WIDTH.search(name) or name in FIXED or not isinstance(value, int) or isinstance(value, bool):
                continue
            hidden = next(
                (n for n in ("hidden_size", "d_model", "n_embd", "embed_dim") if isinstance(own.get(n), int)), None
            )
            many = next(
                (
                    own[n]
                    for n in ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads")
                    if isinstance(own.get(n), int)
                ),
                0,
            )
            if hidden and many * value == own[hidden] and isinstance(heads, int):
                new[name] = new[hidden] // heads
            elif name == "qk_head_dim":
                new[name] = FIXED["qk_nope_head_dim"] + FIXED["qk_rope_head_dim"]
            else:
                new[name] = min(value, 16 if "rope" in name else 32)


def _sections(rotation: dict[str, Any], new: dict[str, Any], heads: int) -> list[int]:
    """Shares of half a head's rotated width, as they were."""
    width = new.get("qk_rope_head_dim") or new.get("head_dim") or new["hidden_size"] // heads
    half = int(width * (1 if new.get("qk_rope_head_dim") else rotation.get("partial_rotary_factor") or 1)) // 2
    old = rotation.get("mrope_section", [2, 1, 1])
    shares = [max(1, half * n // sum(old)) for n in old[1:]]
    return [half - sum(shares), *shares]


def _pattern(name: str, values: list[Any], layers: int) -> list[Any]:
    """One value a layer, every kind at least twice."""
    try:
        kinds = list(dict.fromkeys(values))
    except TypeError:
        return values[:layers]
    if name == "mlp_layer_types":  # so that each kind meets each kind of attention
        return sorted(islice(cycle(kinds), layers), key=kinds.index)
    return list(islice(cycle(kinds), layers))


def small_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small config of this class."""
    whole = kind(**START.get(kind.model_type, {}))
    return Shrinking(whole, GIVEN).small(whole)

"""Models of which written anatomies found some blocks and silently not the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.sites import Site, structure
from tests.support.small import batch_of, small

TOWERS: dict[str, dict[str, int]] = {
    "glm4_moe": {"lm": 4},
    "ernie4_5_moe": {"lm": 4},
    "dots1": {"lm": 4},
    "qwen3_moe": {"lm": 4},
    "qwen3_5_text": {"lm": 4},
    "longt5": {"encoder": 4, "decoder": 4},
    "mllama": {"image": 4, "global_transformer": 4, "lm": 4},
    "blip": {"image": 4, "text": 4},
    "qwen2_vl": {"image": 4, "lm": 4},
    "internvl": {"image": 4, "lm": 4},
    "detr": {"backbone": 8, "encoder": 4, "decoder": 4},
    "timesformer": {"image": 4},
    "groupvit": {"text": 4, "image": 6},
}
"""Blocks of each tower; the last one is the one that the output comes from."""

PAIRS = {"groupvit"}
"""Types whose towers meet in the output alone."""

SETTINGS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"first_k_dense_replace": 2},
    "ernie4_5_moe": {"moe_layer_start_index": 2},
    "dots1": {"first_k_dense_replace": 2},
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
}
"""Mixtures of experts whose first blocks, or every other one, have a plain network."""

DENSE = {"glm4_moe": {0, 1}, "ernie4_5_moe": {0, 1}, "dots1": {0, 1}, "qwen3_moe": {0, 2}}
MIXES = re.compile(r"(attn|cross|mixer)\.|conv$")
types = pytest.mark.parametrize("kind", TOWERS)


def _build(kind: str) -> nn.Module:
    return small(kind, **SETTINGS.get(kind, {}))


def _inside(found: list[Site], block: Site) -> set[str]:
    return {s.role for s in found if s.path.startswith(f"{block.path}.") and not s.dead}


@types
def test_every_block_is_found_in_its_tower_and_order(kind: str) -> None:
    found = structure(_build(kind))
    blocks = [s for s in found if s.role == "block"]
    assert dict(Counter(s.tower for s in blocks)) == TOWERS[kind]
    for tower, count in TOWERS[kind].items():
        assert sorted(s.depth for s in blocks if s.tower == tower) == list(range(count))


@types
def test_attention_of_every_block_is_whole(kind: str) -> None:
    """A block that has one projection of an attention has all of them."""
    found = structure(_build(kind))
    for block in (s for s in found if s.role == "block"):
        roles = _inside(found, block)
        for part in ("attn", "cross"):
            own = {role for role in roles if role in {f"{part}.{name}" for name in ("q", "k", "v", "out")}}
            assert len(own) in (0, 4), (block.path, own)
        if block.tower != "backbone":
            assert any(MIXES.match(role) for role in roles), (block.path, roles)


def _is_tunable(site: Site) -> bool:
    plain = site.kind in ("linear", "conv") and site.role.startswith(("attn.", "cross.", "mlp.", "mixer.", "conv"))
    return plain and site.depth >= 0 and not site.dead and not site.refuse


@types
def test_lora_lives_in_every_block(kind: str) -> None:
    """A gradient reaches some factor of every block, once gates that begin closed are open."""
    model = _build(kind)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and not tensor.any():
                tensor.fill_(0.1)
    blocks = [s.path for s in structure(model) if s.role == "block"]
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at=_is_tunable))
    args, kwargs = batch_of(model)
    alive = {p.tensor for p in tuning.liveness(kwargs or args).pulses if p.alive}
    homes = {
        placement.home
        for placement in tuning.placements
        if any(f"{placement.home}." in f".{name}" or name.startswith(f"{placement.home}.") for name in alive)
    }
    assert not [b for b in blocks if not any(home.startswith(f"{b}.") for home in homes)]


@types
def test_last_blocks_trains_what_ran_last(kind: str) -> None:
    """The block that runs last in the tower that the output comes from trains, and no other."""
    model = _build(kind)
    blocks = [s for s in structure(model) if s.role == "block"]
    last: dict[str, str] = {}
    for site in blocks:
        block = model.get_submodule(site.path)
        block.forward = partial(_noted, last, site, block.forward)
    args, kwargs = batch_of(model)
    with torch.no_grad():
        model(*args, **kwargs)
    for site in blocks:
        del model.get_submodule(site.path).forward
    mmpeft.attach(model, mmpeft.LastBlocks())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    ends = set(last) if kind in PAIRS else {list(TOWERS[kind])[-1]}
    assert {s.path for s in blocks if any(name.startswith(f"{s.path}.") for name in trained)} == {
        last[tower] for tower in ends
    }


@pytest.mark.parametrize("kind", DENSE)
def test_plain_networks_among_experts_are_found(kind: str) -> None:
    found = structure(_build(kind))
    for block in (s for s in found if s.role == "block"):
        roles = _inside(found, block)
        assert {"attn.q", "attn.k", "attn.v", "attn.out", "mlp"} <= roles
        assert ("mlp.up" in roles and "router" not in roles) == (block.depth in DENSE[kind])
        assert ("expert.up" in roles) == (block.depth not in DENSE[kind])


def _noted(last: dict[str, str], site: Site, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    last[site.tower] = site.path
    return forward(*args, **kwargs)

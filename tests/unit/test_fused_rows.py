"""Rows of fused projections, proven by the models: a change in them changes what its role says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.llm.inputs import example_inputs
from mmpeft.methods.base import own_weight
from mmpeft.sites import Site, structure
from tests.zoo import hf

FUSED: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "bloom": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon many": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    "phi3": {},
    "dbrx": {},
    "mpt": {},
    "gpt_bigcode": {},
    "gpt_bigcode many": {"multi_query": False},
    "codegen": {},
    "persimmon": {},
    "gpt2": {},
    "gpt_neox_japanese": {},
    "qwen3_5_text": {},
    "qwen3_next": {},
}
fused = pytest.mark.parametrize("name", FUSED)


def _build(name: str) -> nn.Module:
    kind, given = name.split()[0], FUSED[name]
    config = hf.small_config(hf.configuration_auto.CONFIG_MAPPING[kind])
    for key, value in given.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return hf.model_class(kind)(config).eval()


class _Products(TorchDispatchMode):
    """Operands of the products of two activations that run in one module: queries by keys, then values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.operands: list[Tensor] = []
        self.is_inside = False
        self.hooks = [
            module.register_forward_pre_hook(lambda m, args: setattr(self, "is_inside", True)),
            module.register_forward_hook(lambda m, args, y: setattr(self, "is_inside", False)),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.is_inside and name in ("bmm", "baddbmm"):
            self.operands += [a.clone() for a in args[-2:]]
        return func(*args, **(kwargs or {}))


def _operands(model: nn.Module, block: str) -> dict[str, Tensor]:
    args, kwargs = _inputs(model)
    seen = _Products(model.get_submodule(block))
    with torch.no_grad(), seen:
        model(*args, **kwargs)
    for hook in seen.hooks:
        hook.remove()
    return {"q": seen.operands[0], "k": seen.operands[1], "v": seen.operands[3]}


def _inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = example_inputs(model)
    assert given is not None
    return given


def _slices(found: list[Site]) -> list[Site]:
    return [s for s in found if s.rows is not None and s.role in ("attn.q", "attn.k", "attn.v", "attn.gate")]


@fused
def test_rows_are_shared_out_once_each(name: str) -> None:
    model = _build(name)
    found = structure(model)
    paths = {s.path for s in _slices(found)}
    assert paths
    for path in paths:
        own = [s for s in found if s.path == path and s.kind == "linear"]
        marks = torch.zeros(len(own_weight(model, own[0])))
        for site in own:
            marks += put_rows(torch.zeros_like(marks), torch.ones_like(take_rows(marks, site.rows)), site.rows)
        assert torch.equal(marks, torch.ones_like(marks))


@fused
def test_rows_change_what_their_role_says(name: str) -> None:
    """Queries, keys and values that enter the attention, each changed by its own rows alone."""
    model = _build(name)
    slices = _slices(structure(model))
    block = next(s for s in structure(model) if s.role == "block" and slices[0].path.startswith(f"{s.path}."))
    before = _operands(model, block.path)
    for site in (s for s in slices if s.path.startswith(f"{block.path}.")):
        weight = own_weight(model, site)
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(put_rows(saved, 1.5 * take_rows(saved, site.rows) + 0.1, site.rows))
        after = _operands(model, block.path)
        with torch.no_grad():
            weight.copy_(saved)
        changed = {part for part in before if not torch.allclose(before[part], after[part])}
        assert changed == ({site.role[-1]} if site.role != "attn.gate" else set()), site

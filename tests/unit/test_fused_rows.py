"""Rows of fused projections, proven by the models: a change in them changes what its role says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.functional.rows import put_rows, take_rows
from mmpeft.methods.recipe import own_weight
from mmpeft.sites import Site, structure
from tests.support.small import batch_of, small

WIDTH, HEADS, GROUPS, LENGTH = 16, 4, 2, 5
HEAD = WIDTH // HEADS


class Block(nn.Module):
    """Rows in the order of ChatGLM: all queries, then the keys of all groups, then their values."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(WIDTH, WIDTH + 2 * GROUPS * HEAD), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inlet(x).split([WIDTH, GROUPS * HEAD, GROUPS * HEAD], dim=-1)
        k, v = (t.unflatten(-1, (GROUPS, HEAD)).repeat_interleave(HEADS // GROUPS, 2) for t in (k, v))
        return x + self.outlet(attended(q.unflatten(-1, (HEADS, HEAD)), k, v))


class Crossing(nn.Module):
    """Keys and values of another stream, head by head from one projection: values first."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.answer, self.outlet = (nn.Linear(WIDTH, n) for n in (WIDTH, 2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        v, k = self.answer(memory).unflatten(-1, (HEADS, 2 * HEAD)).chunk(2, dim=-1)
        return x + self.outlet(attended(self.ask(x).unflatten(-1, (HEADS, HEAD)), k, v))


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


class Own(nn.Module):
    """Blocks one after the other; a shared one runs three times."""

    def __init__(self, kind: Callable[[], nn.Module], shared: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(1 if shared else 2))
        self.times = 3 if shared else 1

    def forward(self, x: Tensor, *memory: Tensor) -> Tensor:
        for block in [*self.blocks] * self.times:
            x = block(x, *memory)
        return x


FUSED: dict[str, Callable[[], nn.Module]] = {
    "gpt_neox": partial(small, "gpt_neox"),
    "bloom": partial(small, "bloom"),
    "falcon": partial(small, "falcon", new_decoder_architecture=False, multi_query=True),
    "falcon grouped": partial(small, "falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon many": partial(small, "falcon", new_decoder_architecture=False, multi_query=False, num_kv_heads=4),
    "phi3": partial(small, "phi3"),
    "phi3 grouped": partial(small, "phi3", num_key_value_heads=2),
    "dbrx": partial(small, "dbrx"),
    "mpt": partial(small, "mpt"),
    "gpt_bigcode": partial(small, "gpt_bigcode"),
    "gpt_bigcode many": partial(small, "gpt_bigcode", multi_query=False),
    "codegen": partial(small, "codegen"),
    "persimmon": partial(small, "persimmon"),
    "gpt2": partial(small, "gpt2"),
    "gpt_neox_japanese": partial(small, "gpt_neox_japanese"),
    "qwen3_5_text": partial(small, "qwen3_5_text"),
    "qwen3_next": partial(small, "qwen3_next"),
    "chatglm": partial(Own, Block),
    "shared": partial(Own, Block, shared=True),
    "cross": partial(Own, Crossing),
}
fused = pytest.mark.parametrize("name", FUSED)


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return FUSED[name]().eval()


def _inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, Own):
        return batch_of(model)
    generator = torch.Generator().manual_seed(1)
    count = 2 if isinstance(model.blocks[0], Crossing) else 1
    return tuple(torch.rand(2, LENGTH, WIDTH, generator=generator) for _ in range(count)), {}


def _found(model: nn.Module) -> list[Site]:
    return structure(model, _inputs(model)[0] if isinstance(model, Own) else None)


def _slices(found: list[Site]) -> list[Site]:
    """Of attentions with a softmax: those without have tests of their own."""
    own = [s for s in found if s.rows is not None and s.role.partition(".")[0] in ("attn", "cross")]
    return [s for s in own if "linear_attn" not in s.path]


class _Products(TorchDispatchMode):
    """Operands of the products of two activations that run in one module: queries by keys, then values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.operands: list[Tensor] = []
        self.given: list[Tensor] = []
        self.is_inside = False
        self.hooks = [module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end)]

    def begin(self, module: nn.Module, args: Any) -> None:
        self.is_inside = True

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.is_inside = False
        self.given.append(output[0] if isinstance(output, tuple) else output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.is_inside and name in ("bmm", "baddbmm"):
            self.operands += [a.clone() for a in args[-2:]]
        elif self.is_inside and "scaled_dot_product" in name:
            self.operands += [args[0].clone(), args[1].clone(), args[2].clone(), args[2].clone()]
        return func(*args, **(kwargs or {}))


def _operands(model: nn.Module, block: str) -> dict[str, Tensor]:
    """What enters the first attention of a block as queries, keys and values, and what the block gives."""
    args, kwargs = _inputs(model)
    seen = _Products(model.get_submodule(block))
    with torch.no_grad(), seen:
        model(*args, **kwargs)
    for hook in seen.hooks:
        hook.remove()
    return {"q": seen.operands[0], "k": seen.operands[1], "v": seen.operands[3], "block": seen.given[0]}


@fused
def test_every_row_has_one_role(name: str) -> None:
    model = _build(name)
    found = _found(model)
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
    """Queries, keys and values that enter the attention, each by its own rows alone; a gate changes none of them."""
    model = _build(name)
    found = _found(model)
    slices = _slices(found)
    block = next(s for s in found if s.role == "block" and slices[0].path.startswith(f"{s.path}.")).path
    before = _operands(model, block)
    own = [s for s in slices if s.path.startswith(f"{block}.")]
    assert {s.role.partition(".")[2] for s in own} >= ({"k", "v"} if name == "cross" else {"q"})
    for site in own:
        weight = own_weight(model, site)
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(put_rows(saved, 1.5 * take_rows(saved, site.rows) + 0.1, site.rows))
        after = _operands(model, block)
        with torch.no_grad():
            weight.copy_(saved)
        changed = {part for part in before if not torch.allclose(before[part], after[part])}
        part = site.role.partition(".")[2]
        assert changed == ({part} if part in ("q", "k", "v") else set()) | {"block"}, site


def test_a_shared_block_has_its_rows_once() -> None:
    own = [(s.role, s.rows) for s in _slices(_found(_build("shared")))]
    assert own == [("attn.q", (0, 16)), ("attn.k", (16, 24)), ("attn.v", (24, 32))]


def test_rows_of_another_stream_are_those_of_cross_attention() -> None:
    own = [(s.role, s.path, s.rows) for s in _slices(_found(_build("cross")))]
    expected = [("cross.k", (4, 8, 8)), ("cross.v", (0, 4, 8))]
    assert sorted(own) == sorted((role, f"blocks.{i}.answer", rows) for i in range(2) for role, rows in expected)

"""torch's attention reads its weights: tuned ones, in training and evaluation, compiled, gated, and at a strength."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import Refused
from mmpeft.sites import Site, anatomy, qualified_name
from tests.support.formed import Formed
from tests.support.moved import attach_moved


class Attends(nn.Module):
    """torch's attention, which reads all of its weights."""

    def __init__(self, first: bool = True, other: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(16, 2, batch_first=first, kdim=other, vdim=other)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return self.attn(x, y, y, need_weights=False)[0]


@anatomy(qualified_name(Attends))
def attends(model: nn.Module) -> list[Site]:
    tensors = [("in_proj_weight", (16 * i, 16 * i + 16)) for i in range(3)]
    if model.attn.in_proj_weight is None:
        tensors = [(f"{n}_proj_weight", None) for n in "qkv"]
    sites = [
        Site("attn", f"attn.{n}", 0, kind="linear", via="weight", tensor=tensor, rows=rows)
        for n, (tensor, rows) in zip("qkv", tensors)
    ]
    return [*sites, Site("attn.out_proj", "attn.out", 0, kind="linear", via="weight")]


def _attended(model: nn.Module, tuning: mmpeft.Tuning) -> nn.Module:
    """An untouched attention that has the effective weights, from the formula."""
    plain = Attends(model.attn.batch_first, model.attn.kdim if model.attn.in_proj_weight is None else None)
    with torch.no_grad():
        for placement in tuning.placements:
            part, hook = placement.part, placement.hooks[0]
            weight = plain.get_submodule(hook.path).get_parameter(hook.name)
            own = weight[part.rows[0] : part.rows[1]] if part.rows else weight
            tuned = own + part.scale * part.factor.B @ part.factor.A
            if part.magnitude is not None:
                tuned = tuned * (part.magnitude / tuned.norm(dim=1))[:, None]
            own.copy_(tuned)
    return plain


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [None, 12])
@pytest.mark.parametrize("method", [mmpeft.LoRA, mmpeft.DoRA])
def test_attention_of_torch(first: bool, other: int | None, method: type) -> None:
    model = Attends(first, other)
    tuning = attach_moved(model, method(rank=2, at="attn.*"))
    plain = _attended(model, tuning)
    x, y = torch.randn(3, 5, 16), torch.randn(3 if first else 6, 6 if first else 5, other or 16)
    calls = [(x, y)] if other else [(x,), (x, y)]
    for training in (True, False):
        model.train(training)
        plain.train(training)
        for call in calls:
            torch.testing.assert_close(model(*call), plain(*call), atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(model(*call), plain(*call), atol=1e-5, rtol=1e-5)
    shapes = [(48, 16), (16, 16), (32, 16), (16, other or 16)]
    with Formed(*shapes) as formed:
        model(*calls[-1]).sum().backward()
    assert not formed.count
    assert all(p.grad is not None for p in tuning.parameters())


def test_dropout_takes_the_input_of_the_update_alone() -> None:
    model = Attends()
    tuning = attach_moved(model, mmpeft.LoRA(rank=2, at="attn.out", dropout=0.5))
    part, x = tuning.placements[0].part, torch.randn(2, 4, 16)
    assert not torch.equal(model(x), model(x))
    mean = torch.stack([model(x) for _ in range(3000)]).mean(0)
    plain = _attended(model, tuning)
    torch.testing.assert_close(mean, plain(x), atol=0.02, rtol=0.02)
    assert part.training
    model.eval()
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["token", "scalar", "constant"])
def test_a_gate_turns_the_update_by_what_the_weight_multiplies(kind: str) -> None:
    model = Attends(first=False)
    tuning = attach_moved(model, mmpeft.gate(mmpeft.LoRA(rank=2, at="attn.v"), kind=kind, start=0.3))
    part, x = tuning.placements[0].part, torch.randn(5, 2, 16)
    plain = Attends(first=False).attn
    g = part.gate(x)
    q, k, v = F.linear(x, plain.in_proj_weight, plain.in_proj_bias).chunk(3, -1)
    v = v + g * part.inner.scale * x @ (part.inner.factor.B @ part.inner.factor.A).t()
    heads = [t.unflatten(-1, (2, 8)).permute(1, 2, 0, 3) for t in (q, k, v)]
    expected = plain.out_proj(F.scaled_dot_product_attention(*heads).permute(2, 0, 1, 3).flatten(2))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(Refused, match="no values of its own"):
        model.attn.in_proj_weight.sum()


def test_a_pooled_gate_is_refused_where_rows_may_be_flattened() -> None:
    with pytest.raises(Refused, match="kind='token'"):
        mmpeft.attach(Attends(), mmpeft.gate(mmpeft.LoRA(rank=2, at="attn.v"), kind="pooled"))


@pytest.mark.parametrize(
    "method",
    [
        mmpeft.LoRA(rank=2, at="attn.*"),
        mmpeft.DoRA(rank=2, at="attn.*"),
        mmpeft.gate(mmpeft.LoRA(rank=2, at="attn.*")),
    ],
    ids=["LoRA", "DoRA", "gate"],
)
def test_compiled_whole_exported_and_differentiated_by_functions(method: mmpeft.Method) -> None:
    model = Attends().eval()
    attach_moved(model, method)
    x = torch.randn(2, 4, 16)
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y, atol=1e-5, rtol=1e-5)

    attention = model.attn
    own = {n: p.detach() for n, p in attention.named_parameters() if p.requires_grad}

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(attention, tensors, (x, x, x))[0].square().sum()

    found = torch.func.grad(loss)(own, x)
    named = {n: p for n, p in attention.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(y.square().sum(), list(named.values()))
    for (name, grad), expected in zip(found.items(), wanted):
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4, msg=name)
    with torch.no_grad():
        each = torch.func.vmap(lambda row: attention(row[None], row[None], row[None])[0][0])(x)
    torch.testing.assert_close(each, y, atol=1e-5, rtol=1e-5)


def test_autocast_and_copies() -> None:
    model = Attends()
    tuning = attach_moved(model, mmpeft.LoRA(rank=2, at="attn.*"))
    x = torch.randn(2, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), _attended(model, tuning)(x), atol=0.05, rtol=0.05)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_two_tunings_at_a_strength() -> None:
    model = Attends()
    first = attach_moved(model, mmpeft.LoRA(rank=2, at="attn.v"))
    plain, x = Attends(), torch.randn(2, 4, 16)
    second = mmpeft.attach(model, mmpeft.DoRA(rank=2, at="attn.out"), "second")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    with torch.no_grad():
        v, out = (t.placements[0].part for t in (first, second))
        plain.attn.in_proj_weight[32:] += 0.5 * v.scale * v.factor.B @ v.factor.A
        weight = plain.attn.out_proj.weight
        tuned = weight + out.scale * out.factor.B @ out.factor.A
        weight.lerp_(tuned * (out.magnitude / tuned.norm(dim=1))[:, None], 0.25)
    mmpeft.use(model, mmpeft.Together(("default", "second"), weights=(0.5, 0.25)))
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    shapes = [(48, 16), (16, 16)]
    with Formed(*shapes) as formed:
        model(x).sum().backward()
    assert not formed.count

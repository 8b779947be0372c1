"""A tuned weight where code reads it: the product of the effective weight in every call, its values to the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.hosting.weights import Weight
from mmpeft.parts import Delta, Hadamard, Kron, LowRank, Rescale
from mmpeft.parts.answered import answered
from mmpeft.parts.product import FUSED_FROM
from tests.support.formed import Formed

O, I = 12, 8  # noqa: E741


def _host(transposed: bool = False, *, magnitude: bool = False, rows: tuple[int, int] | None = None) -> nn.Linear:
    """A linear with one part that has values of its own, under `part`."""
    torch.manual_seed(0)
    host = nn.Linear(I, O).requires_grad_(False)
    if transposed:
        host.weight = nn.Parameter(host.weight.t().contiguous(), False)
    weight = host.weight.t() if transposed else host.weight
    own = O if rows is None else rows[1] - rows[0]
    host.part = Delta(weight, LowRank(own, I, 2, weight), 1.5, rows, magnitude=magnitude, transposed=transposed)
    nn.init.normal_(host.part.factor.B, std=0.3)
    return host


def _read(host: nn.Module) -> Weight:
    found = answered(host, "weight", host._parameters["weight"], (host.part,))
    assert isinstance(found, Weight)
    return found


def _effective(host: nn.Module) -> Tensor:
    """`g ⊙ (W + s B A)` on the rows of the part, as stored, from the formula."""
    part, stored = host.part, host._parameters["weight"]
    whole = (stored.t() if part.transposed else stored).clone()
    start, stop = part.rows or (0, O)
    tuned = whole[start:stop] + part.scale * part.factor.B @ part.factor.A
    if part.magnitude is not None:
        tuned = tuned * (part.magnitude / tuned.detach().norm(dim=1))[:, None]
    whole = torch.cat([whole[:start], tuned, whole[stop:]])
    return whole.t() if part.transposed else whole


x, bias = torch.randn(3, 5, I), torch.randn(O)
PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: F.linear(x, w, bias),
    "linear by name": lambda w: F.linear(input=x, weight=w, bias=bias),
    "@ t()": lambda w: x @ w.t(),
    "@ T": lambda w: x @ w.T + bias,
    "@ mT": lambda w: torch.matmul(x, w.mT),
    "matmul method": lambda w: x.matmul(w.transpose(0, 1)),
    "mm": lambda w: torch.mm(x[0], w.permute(1, 0)),
    "addmm": lambda w: torch.addmm(bias, x[0], w.t()),
    "addmm method": lambda w: bias.addmm(x[0], w.t(), alpha=0.5, beta=2),
    "left": lambda w: w @ x.mT,
    "left of a vector": lambda w: w @ x[0, 0],
    "mv": lambda w: torch.mv(w, x[0, 0]),
    "vector": lambda w: F.linear(x[0, 0], w),
    "rows": lambda w: F.linear(x, w[3:9], bias[3:9]),
    "last rows": lambda w: F.linear(x, w[-4:, :]),
    "chunk": lambda w: torch.stack([F.linear(x, c) for c in w.chunk(3)]),
    "torch.chunk": lambda w: torch.stack([x @ c.t() for c in torch.chunk(w, 3, dim=0)]),
    "split": lambda w: torch.cat([F.linear(x, c) for c in w.split([5, 7])], -1),
    "torch.split": lambda w: torch.cat([F.linear(x, c) for c in torch.split(w, 5)], -1),
    "narrow": lambda w: F.linear(x, w.narrow(0, 2, 6)),
    "columns of the transpose": lambda w: x @ w.t()[:, 2:7],
    "stack": lambda w: torch.stack([F.linear(x, c) for c in w.view(3, 4, I).unbind(0)]),
    "stack, one": lambda w: F.linear(x, w.reshape(3, -1, I)[1]),
    "unflatten": lambda w: F.linear(x, w.unflatten(0, (2, 6)).unbind()[1]),
    "and back": lambda w: F.linear(x, w.view(3, 4, I).view(-1, I)),
    "cast": lambda w: F.linear(x.double(), w.double()),
    "to and back": lambda w: F.linear(x, w.to(torch.float64).type_as(x).contiguous()),
    "to device": lambda w: F.linear(x, w.to("cpu", torch.float32)),
}
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda w: w.sum(),
    "norm": lambda w: F.normalize(w, dim=1),
    "times": lambda w: w * 2 + 1,
    "cat": lambda w: torch.cat([w, w]),
    "an entry": lambda w: w[2, 3],
    "a column": lambda w: w[:, 1],
    "columns": lambda w: F.linear(x[..., :4], w[:, :4]),
    "every other row": lambda w: F.linear(x, w[::2]),
    "einsum": lambda w: torch.einsum("bni,oi->bno", x, w),
    "as input": lambda w: F.linear(w, torch.ones(2, I)),
    "the other way": lambda w: torch.ones(2, O) @ w,
    "bilinear": lambda w: w.t() @ w,
    "batched": lambda w: torch.bmm(x, w.t().expand(3, -1, -1)),
    "clone": lambda w: w.clone(),
}
variants = pytest.mark.parametrize(
    "variant", [{}, {"magnitude": True}, {"rows": (4, 9)}, {"transposed": True}], ids=str
)


@pytest.mark.parametrize("name", [*PRODUCTS, *VALUES])
@variants
def test_it_acts_as_the_effective_weight_with_its_gradients(name: str, variant: dict) -> None:
    host, run = _host(**variant), {**PRODUCTS, **VALUES}[name]
    if variant.get("transposed"):  # stored [i, o], as transformers' Conv1D does
        inner = run

        def run(w: Tensor) -> Tensor:
            return inner(w.t())

    own = list(host.part.parameters())
    expected, actual = run(_effective(host)), run(_read(host))
    assert type(actual) is Tensor
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    seed = torch.randn(expected.shape, dtype=expected.dtype)
    wanted = torch.autograd.grad((expected * seed).sum(), own, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad((actual * seed).sum(), own, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_forms_no_weight_and_no_gradient_of_one(name: str) -> None:
    host = _host()
    with Formed((O, I), (I, O), (6, I), (4, I), (5, I), (7, I)) as formed:
        PRODUCTS[name](_read(host)).sum().backward()
    assert formed.count <= ("cast" in name or "to and" in name)  # the frozen weight itself in the other type
    assert host.part.factor.A.grad is not None


def test_large_inputs_take_the_fused_function() -> None:
    host, many = _host(), torch.randn(FUSED_FROM // I, I)
    y = F.linear(many, _read(host))
    assert y.grad_fn is not None
    fused = y.grad_fn.next_functions[0][0]  # behind the view that gives it its shape
    assert type(fused).__name__ == "_LowRankLinearBackward"
    torch.testing.assert_close(y, F.linear(many, _effective(host)), atol=1e-5, rtol=1e-5)


def test_it_looks_like_the_tensor_it_stands_for() -> None:
    host = _host()
    weight, effective = _read(host), _effective(host)
    assert (weight.shape, weight.dtype, weight.device) == (effective.shape, effective.dtype, effective.device)
    assert weight.t().shape == (I, O)
    assert weight.view(3, 4, I).shape == (3, 4, I)
    assert weight.half().dtype == torch.float16
    assert weight.requires_grad
    assert not weight.detach().requires_grad
    assert (weight.dim(), len(weight), weight.numel(), weight.size(1)) == (2, O, O * I, I)
    torch.testing.assert_close(copy.deepcopy(weight.detach()), effective.detach())
    with torch.no_grad():
        assert not _read(host).requires_grad
    assert weight.to(torch.int32).dtype == torch.int32


@pytest.mark.parametrize("wrong", [torch.randn(3, O), torch.randn(3, I).double(), torch.tensor(1.0)])
def test_what_does_not_fit_fails_as_with_any_tensor(wrong: Tensor) -> None:
    with pytest.raises(RuntimeError):
        F.linear(wrong, _read(_host()))


@pytest.mark.parametrize("change", ["mul_", "zero_", "copy_", "data", "item"])
def test_a_change_in_place_would_be_lost_and_is_refused(change: str) -> None:
    weight = _read(_host())
    changes = {
        "data": lambda: setattr(weight, "data", torch.zeros(O, I)),
        "item": lambda: weight.__setitem__(0, 0.0),
        "zero_": weight.zero_,
    }
    with pytest.raises(Refused, match="computed on reading"):
        changes.get(change, lambda: getattr(weight, change)(torch.ones(O, I)))()


class Custom(torch.autograd.Function):
    """A linear of somebody's own, with the gradient of the whole weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@variants
def test_an_autograd_function_of_others_reaches_the_tuning(variant: dict) -> None:
    host, rows = _host(**variant), torch.randn(6, I, requires_grad=True)
    shown = (lambda w: w.t()) if variant.get("transposed") else (lambda w: w)
    own = [rows, *host.part.parameters()]
    wanted = torch.autograd.grad(Custom.apply(rows, shown(_effective(host))).square().sum(), own)
    found = torch.autograd.grad(Custom.apply(rows, shown(_read(host))).square().sum(), own)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_second_derivatives_are_those_of_the_effective_weight() -> None:
    host = _host()
    first = host.part.factor.A

    def curvature(weight: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(F.linear(x, weight).pow(3).sum(), first, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), host.part.factor.B)[0]

    torch.testing.assert_close(curvature(_read(host)), curvature(_effective(host)), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("factor", [LowRank, Kron, Hadamard], ids=lambda f: f.__name__)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(factor: type, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=groups).requires_grad_(False)
    size = (6, conv.weight[0].numel())
    conv.part = Delta(
        conv.weight, Kron((2, size[1]), (3, 1), conv.weight) if factor is Kron else factor(*size, 2, conv.weight), 1.5
    )
    for p in conv.part.parameters():
        nn.init.normal_(p, std=0.3)
    effective = conv.weight + 1.5 * conv.part.factor.materialise().view_as(conv.weight)
    maps, options = torch.randn(2, 4, 7, 7), {"stride": 2, "padding": 1, "groups": groups}
    for b in (None, conv.bias):
        expected = F.conv2d(maps, effective, b, **options)
        torch.testing.assert_close(F.conv2d(maps, _read(conv), b, **options), expected, atol=1e-5, rtol=1e-5)
    conv.part.dropout = 0.5
    torch.manual_seed(1)
    dropped = F.dropout(maps, 0.5)
    expected = F.conv2d(maps, conv.weight, None, **options) + F.conv2d(dropped, effective - conv.weight, **options)
    torch.manual_seed(1)
    torch.testing.assert_close(F.conv2d(maps, _read(conv), None, **options), expected, atol=1e-5, rtol=1e-5)


def test_a_table_is_looked_up() -> None:
    table = nn.Embedding(9, I).requires_grad_(False)
    table.part = Delta(table.weight.t(), LowRank(I, 9, 2, table.weight, lookup=True), 1.5, transposed=True, lookup=True)
    nn.init.normal_(table.part.factor.A)
    words = torch.tensor([[1, 2, 8], [0, 0, 3]])
    effective = table.weight + 1.5 * (table.part.factor.B @ table.part.factor.A).t()
    with Formed((9, I), (I, 9)) as formed:
        found = F.embedding(words, _read(table), padding_idx=0)
    assert not formed.count
    torch.testing.assert_close(found, F.embedding(words, effective), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.embedding(words, _read(table), max_norm=1e9), F.embedding(words, effective))


def test_scalings_of_rows_and_of_inputs_are_products_too() -> None:
    host = _host()
    rows, inputs = Rescale(O, host.weight, rows=(2, 7)), Rescale(I, host.weight, side="input")
    for part in (rows, inputs):
        nn.init.normal_(part.gamma)
    parts = (host.part, rows, inputs)
    effective = _effective(host)
    effective = torch.cat([effective[:2], effective[2:7] * rows.gamma[:, None], effective[7:]]) * inputs.gamma
    with Formed((O, I), (6, I)) as formed:
        found = F.linear(x, answered(host, "weight", host.weight, parts), bias)
        half = F.linear(x, answered(host, "weight", host.weight, parts)[3:9], bias[3:9])
    assert not formed.count
    torch.testing.assert_close(found, F.linear(x, effective, bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half, F.linear(x, effective[3:9], bias[3:9]), atol=1e-5, rtol=1e-5)
    values = answered(host, "weight", host.weight, parts) + 0
    torch.testing.assert_close(values, effective, atol=1e-5, rtol=1e-5)


def test_updates_below_a_gain_are_within_its_norm() -> None:
    host = _host(magnitude=True)
    inner = Delta(host.weight, LowRank(O, I, 2, host.weight), 0.7)
    nn.init.normal_(inner.factor.B)
    within = host.weight + 0.7 * inner.factor.B @ inner.factor.A + 1.5 * host.part.factor.B @ host.part.factor.A
    effective = within * (host.part.magnitude / within.norm(dim=1))[:, None]
    found = F.linear(x, answered(host, "weight", host.weight, (inner, host.part)))
    torch.testing.assert_close(found, F.linear(x, effective), atol=1e-5, rtol=1e-5)

"""Loops that change outputs in place, as they may on any model: outputs are ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.sites import Site, anatomy, qualified_name
from tests.compat.models import bend, causal, close, gradients, images, plain, untouched, vit, words
from tests.compat.rows import row


class Outputs(nn.Module):
    """Answers with a tuple, a list, a dict or a view, as asked."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.q = form, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.q(x)
        if self.form == "tuple":
            return y, y.sum(-1)
        if self.form == "list":
            return [y, None, 3]
        if self.form == "dict":
            return {"y": y, "loss": y.mean()}
        if self.form == "view":
            return y.view(-1)
        if self.form == "slice":
            return y[:, 1:3]
        return y


@anatomy(qualified_name(Outputs))
def _sites(model: nn.Module) -> list[Site]:
    return [Site("q", "attn.q", 0, kind="linear")]


def _assigned(y: Tensor) -> Tensor:
    y[..., 0] = 0
    return y.square().sum()


def _divided(y: Tensor) -> Tensor:
    y /= 0.07
    return y.square().sum()


def _added(y: Tensor) -> Tensor:
    y.add_(1)
    return y.square().sum()


def _masked(y: Tensor) -> Tensor:
    y.masked_fill_(y < 0, 0.0)
    return y.sum()


def _loss_divided(y: Tensor) -> Tensor:
    loss = y.square().sum()
    loss /= 4
    return loss


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "divided": _divided,
    "added": _added,
    "assigned": _assigned,
    "masked": _masked,
    "loss": _loss_divided,
}


def _grads(tuning: Any, loss: Tensor) -> dict[str, Tensor]:
    for parameter in tuning.parameters():
        parameter.grad = None
    loss.backward()
    return gradients(tuning)


@row("torch", "`logits /= .07`, `logits.add_`, `y[..., 0] = 0`, `loss /= 4` on a model's output")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recompute", [None, "block"])
def test_outputs_change_in_place(change: str, recompute: Any) -> None:
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2)))
    tuning.recompute = recompute
    expected = plain(tuning, before)
    y = model(images())
    close(CHANGES[change](y).detach(), CHANGES[change](expected(images())).detach(), 1e-4)
    got = _grads(tuning, CHANGES[change](model(images())))
    out = _grads(tuning, CHANGES[change](model(images()).clone()))
    for name in got:
        close(got[name], out[name])


@row("torch", "outputs in tuples, lists, dicts, views and slices, changed in place")
@pytest.mark.parametrize("form", ["tuple", "list", "dict", "view", "slice", "tensor"])
def test_parts_of_outputs_change_in_place(form: str) -> None:
    torch.manual_seed(0)
    model = Outputs(form)
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2)))
    x = torch.randn(3, 8)
    got, expected = model(x), plain(tuning, before)(x)
    assert type(got) is type(expected)
    if isinstance(got, dict):
        assert list(got) == list(expected)
        got["loss"] /= 4
        got["y"].mul_(2)
        (got["loss"] + got["y"].sum()).backward()
        return
    y = got if isinstance(got, Tensor) else got[0]
    y.mul_(2)
    y[0] = 1
    y.sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())


@row("transformers", "`output.loss /= 4`, `output.logits /= .07` in place on a ModelOutput")
def test_a_model_output_changes_in_place() -> None:
    model = causal()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2)))
    expected = plain(tuning, before)(input_ids=words(), labels=words())
    got = model(input_ids=words(), labels=words())
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    got.loss /= 4
    got.logits /= 0.07
    close(got.loss, expected.loss / 4)
    close(got.logits, expected.logits / 0.07, 1e-4)
    (got.loss + got.logits.square().mean()).backward()


def _graph(y: Tensor) -> list[str]:
    seen: set[Any] = set()
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [child for child, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


@row("torch", "outputs are ordinary tensors: type, no view, the base's last node in the graph")
@pytest.mark.parametrize("build", [causal, vit], ids=["llama", "vit"])
def test_outputs_are_ordinary_tensors(build: Any) -> None:
    model = build()
    before = untouched(model)
    before.requires_grad_(True)
    mmpeft.attach(model, mmpeft.LoRA(rank=2))

    def answer(one: Any) -> Tensor:
        return one(images()) if build is vit else one(words()).logits

    got, expected = answer(model), answer(before)
    assert type(got) is type(expected)
    assert got._is_view() == expected._is_view()
    assert type(got.grad_fn).__name__ == type(expected.grad_fn).__name__
    assert not [name for name in _graph(got) if "Route" in name or "Mark" in name]


@row("torch", "hidden states handed out by a hook or `output_hidden_states`, changed in place")
def test_hidden_states_change_in_place() -> None:
    model = causal()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.*|mlp.*")))
    expected = plain(tuning, before)

    def steer(one: Any) -> Tensor:
        def add(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.add_(0.5)

        handle = one.model.layers[0].register_forward_hook(add)
        y = one(words(), output_hidden_states=True)
        handle.remove()
        return y.hidden_states[-1]

    close(steer(model), steer(expected), 1e-4)
    steer(model).sum().backward()
    # the output of a tuned linear itself
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32, requires_grad=True)
    y = layer(x)
    y += 1
    y[..., 0] = 0
    y.sum().backward()
    assert x.grad is not None

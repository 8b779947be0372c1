"""What others read of a module - signature, names, annotations, doc, class - is the base's, in every hosted module."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.hosting.host import is_host
from mmpeft.sites import Site, anatomy, qualified_name
from tests.compat.models import ALL, bend, causal, close, images, t5, tuned, untouched, vit, words
from tests.compat.rows import row
from tests.matrix.families import FAMILIES

MODELS: dict[str, Callable[[], Any]] = {
    "llama": causal,
    "gpt2": lambda: causal("gpt2"),
    "t5": t5,
    "vit": vit,
    "unet": lambda: FAMILIES["sd_unet"]().model,
    "open_clip": lambda: FAMILIES["open_clip"]().model,
    "eva": lambda: FAMILIES["eva"]().model,
    "bert": lambda: FAMILIES["bert"]().model,
}
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: mmpeft.LoRA(rank=2, at=ALL),
    "BitFit": mmpeft.BitFit,
    "Full": mmpeft.Full,
}
_of = pytest.mark.parametrize("model", MODELS)


def _readings(module: nn.Module, wrapped: bool) -> dict[str, Any]:
    """What inspection says of a module and of its class."""
    forward, cls = module.forward, type(module)
    found: dict[str, Any] = {
        "signature": inspect.signature(forward),
        "signature of the class": inspect.signature(cls.forward),
        "signature of the constructor": inspect.signature(cls),
        "parameters": list(inspect.signature(forward).parameters),
    }
    if not wrapped:  # the base's own decorators hide it
        found["full argument specification"] = inspect.getfullargspec(forward)
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__"):
        found[f"forward.{name}"] = getattr(forward, name)
        if name != "__annotations__":
            found[f"class.{name}"] = getattr(cls, name, None)
    found["str of the class"], found["repr of the class"], found["_get_name"] = str(cls), repr(cls), module._get_name()
    found["source"] = inspect.getsource(cls.forward)
    found["file"] = inspect.getfile(cls)
    try:
        found["type hints"] = typing.get_type_hints(forward)
    except (NameError, TypeError):
        found["type hints"] = None
    return found


@row("torch", "`inspect` on every hosted module: signature, names, doc, annotations, source, class")
@_of
@pytest.mark.parametrize("method", METHODS)
def test_inspection_finds_the_base(model: str, method: str) -> None:
    tuned_model = MODELS[model]()
    before = untouched(tuned_model)
    mmpeft.attach(tuned_model, METHODS[method]())
    seen = 0
    for path, base in before.named_modules():
        module = tuned_model.get_submodule(path)
        if is_host(module):
            seen += 1
            wrapped = hasattr(base.forward, "__wrapped__")
            got, expected = _readings(module, wrapped), _readings(base, wrapped)
            wrong = {key: (got[key], expected[key]) for key in expected if got[key] != expected[key]}
            assert not wrong, f"{path or 'the model'}: {wrong}"
    assert seen > 2


@row("torch", "first argument by keyword, all by keyword, all by position")
def test_arguments_by_keyword_and_position() -> None:
    model = causal()
    _, _, expected = tuned(model, at="attn.*|mlp.*|embed|head")
    linear, plain_linear = model.model.layers[0].self_attn.q_proj, expected.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    close(linear(input=x), plain_linear(x))
    close(model.model.embed_tokens(input=words()), expected.model.embed_tokens(words()))
    mask = torch.ones(4, 6, dtype=torch.long)
    close(model(words(), mask).logits, expected(words(), mask).logits)
    close(model(attention_mask=mask, input_ids=words()).logits, expected(words(), mask).logits)
    vision = vit()
    _, _, other = tuned(vision)
    close(vision(x=images()), other(images()))


@row("torch", "too many, missing and unknown arguments raise the base's own error")
def test_wrong_arguments_raise_what_the_base_raises() -> None:
    model = causal()
    before = untouched(model)
    mmpeft.attach(model, mmpeft.LoRA(rank=2) + mmpeft.BitFit())
    x = torch.randn(2, 3, 32)
    for args, kwargs in [((x, x), {}), ((), {}), ((x,), {"scale": 2}), ((x,), {"input": x})]:
        errors = []
        for one in (before, model):
            with pytest.raises(TypeError) as caught:
                one.model.layers[0].self_attn.q_proj(*args, **kwargs)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


# -- forwards of every form -------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)


class Variadic(_Block):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.q(args[0]) + sum(args[1:])


class KeywordOnly(_Block):
    def forward(self, *, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.q(x) * scale


class AnyKeywords(_Block):
    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.q(inputs["x"]) + inputs.get("y", 0)


class PositionalOnly(_Block):
    def forward(self, x: torch.Tensor, y: float = 1.0, /) -> torch.Tensor:
        return self.q(x) * y


class Late(_Block):
    """What a part needs comes second, and may come by name in any order."""

    def forward(self, mask: torch.Tensor | None, x: torch.Tensor, *rest: float, gain: float = 1.0) -> torch.Tensor:
        return self.q(x) * gain + (0 if mask is None else mask)


class Nothing(_Block):
    def forward(self) -> torch.Tensor:
        return self.q.weight


def _sites(model: nn.Module) -> list[Site]:
    return [Site("q", "attn.q", 0, kind="linear")]


for _cls in (Variadic, KeywordOnly, AnyKeywords, PositionalOnly, Late, Nothing):
    anatomy(qualified_name(_cls))(_sites)

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
CALLS: list[tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = [
    (Variadic, (X, X), {}),
    (Variadic, (X,), {}),
    (KeywordOnly, (), {"scale": 3.0, "x": X}),
    (AnyKeywords, (), {"y": X, "x": X}),
    (PositionalOnly, (X, 3.0), {}),
    (Late, (None, X), {}),
    (Late, (X, X, 1.0), {"gain": 2.0}),
    (Late, (), {"x": X, "mask": None}),
    (Late, (), {"gain": 0.5, "mask": X, "x": X}),
    (Nothing, (), {}),
]


@row("torch", "`forward(*args)`, `(**kwargs)`, `(*, x)`, `(x, /)`, `(mask, x)`, `()`: signature and value")
@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0].__name__}-{len(c[1])}-{'-'.join(c[2])}")
@pytest.mark.parametrize(
    "method", [mmpeft.LoRA(rank=2), mmpeft.LoRA(rank=2) + mmpeft.BitFit()], ids=["LoRA", "LoRA+BitFit"]
)
def test_forwards_of_every_form(call: Any, method: Any) -> None:
    cls, args, kwargs = call
    model = cls()
    before = untouched(model)
    tuning = mmpeft.attach(model, method)
    assert inspect.signature(model.forward) == inspect.signature(before.forward)
    close(model(*args, **kwargs), before(*args, **kwargs))
    bend(tuning)
    if cls is not Nothing:  # reads the weight itself, which a linear's update does not change
        assert not torch.allclose(model(*args, **kwargs), before(*args, **kwargs))

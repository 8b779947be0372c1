"""LoRA, DoRA and (IA)³ give HF PEFT's answers and gradients on language and diffusion models; other loaders of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmpeft
from mmpeft.errors import AdapterFileError
from mmpeft.formats.exchange import export, load_foreign
from tests.matrix.example import Example
from tests.matrix.families import FAMILIES

peft = pytest.importorskip("peft")

close = torch.testing.assert_close
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# (IA)³ beside: which projections, and which of them are scaled on their input
CASES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "llama": (["q_proj", "v_proj", "down_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": (["query", "value"], ["key", "value", r"layer\.\d\.output\.dense"], [r"layer\.\d\.output\.dense"]),
    "t5": (["q", "v", "wo"], ["k", "v", "wo"], ["wo"]),
    "sd_unet": (["to_q", "to_v", "to_out.0", "conv1"], ["to_k", "to_v", "net.2"], ["net.2"]),
    "sd3": (["to_q", "to_v", "add_k_proj"], ["to_k", "to_v", "net.2"], ["net.2"]),
}


def pattern(names: list[str]) -> str:
    return ".*(" + "|".join(name if "\\" in name else rf"\.{name.replace('.', '[.]')}" for name in names) + ")"


def made(family: str, config: Any) -> tuple[Any, Example]:
    """PEFT's model with values of its own in every tensor that trains."""
    example = FAMILIES[family]()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        theirs = peft.get_peft_model(copy.deepcopy(example.model), config).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "ia3_" in name:  # PEFT lets the base of multi-head attention require gradients
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs, example


def gradients(y: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return list(torch.autograd.grad((y * weights).sum(), parameters))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3"])
@pytest.mark.parametrize("family", CASES)
def test_answers_and_gradients(family: str, kind: str, tmp_path: Path) -> None:
    names, scaled, inner = CASES[family]
    if kind == "IA3":
        config = peft.IA3Config(target_modules=pattern(scaled), feedforward_modules=pattern(inner))
    else:
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=pattern(names), use_dora=kind == "DoRA")
    theirs, example = made(family, config)
    theirs.save_pretrained(str(tmp_path))
    model = example.model
    tuning = load_foreign(model, tmp_path)
    ours, other = example(), example(theirs)
    close(ours, other, **CLOSE)
    pairs: list[tuple[Tensor, Tensor]] = []
    for placement in tuning.placements:
        layer, part = theirs.base_model.model.get_submodule(placement.home), placement.part
        if kind == "IA3":
            pairs.append((part.gamma, layer.ia3_l["default"]))
            continue
        pairs += [(part.factor.A, layer.lora_A["default"].weight), (part.factor.B, layer.lora_B["default"].weight)]
        if kind == "DoRA":
            pairs.append((part.magnitude, layer.lora_magnitude_vector["default"].weight))
    mine = gradients(ours, [m for m, _ in pairs])
    for a, b in zip(mine, gradients(other, [o for _, o in pairs])):
        largest = float(b.abs().max())
        assert largest > 0
        close(a.reshape(b.shape), b, atol=1e-5 * largest, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", mmpeft.LoRA), ("bert", mmpeft.LoRA), ("t5", mmpeft.LoRA), ("llama", mmpeft.DoRA)],
    ids=["llama", "bert", "t5", "DoRA"],
)
def test_what_we_export_loads_in_transformers(family: str, method: Any, tmp_path: Path) -> None:
    """Its loader has names of its own for DoRA's lengths: it does not find those that PEFT writes."""
    example = FAMILIES[family]()
    tuning = mmpeft.attach(example.model, method(at="attn.{q,v}|mlp.down", rank=2, alpha=3))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    y = example.answer()
    export(tuning, tmp_path)
    other = FAMILIES[family]()
    plain = other.answer()
    other.model.load_adapter(str(tmp_path))
    close(other.answer(), y, **CLOSE)
    assert (y - plain).abs().max() > 1e-3


def test_adapters_of_multihead_attention_are_refused(tmp_path: Path) -> None:
    theirs, example = made("open_clip", peft.LoraConfig(r=2, target_modules=["attn"]))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="MultiheadAttention"):
        load_foreign(example.model, tmp_path)

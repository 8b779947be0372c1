"""Updates of experts as HF PEFT has them (`target_parameters`): the same answers on both sides, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft import attach
from mmpeft.errors import AdapterFileError, Refused
from mmpeft.llm.inputs import example_inputs
from mmpeft.methods import DoRA, LoRA
from tests.support.moved import add_noise
from tests.zoo.hf import build

peft = pytest.importorskip("peft")

TYPES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")
BOTH = ["experts.down_proj", "experts.gate_up_proj"]


def mixture(model_type: str) -> nn.Module:
    model = build(model_type)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def answer(model: nn.Module) -> Tensor:
    args, kwargs = example_inputs(mixture_of(model))
    with torch.no_grad():
        return model(*args, **kwargs).logits  # type: ignore[no-any-return]


def mixture_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def theirs(model_type: str, folder: Path, **options: Any) -> Tensor:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=BOTH, **options)
    model = peft.get_peft_model(mixture(model_type), config).eval()
    add_noise(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return answer(model)


@pytest.mark.parametrize("model_type", TYPES)
def test_their_folder_gives_their_answers(model_type: str, tmp_path: Path) -> None:
    expected = theirs(model_type, tmp_path)
    model = mixture(model_type)
    base = answer(model)
    mmpeft.load_foreign(model, tmp_path)
    assert torch.allclose(answer(model), expected, atol=1e-4)
    assert (expected - base).abs().max() > 0.1


def test_ranks_of_their_own_and_rslora(tmp_path: Path) -> None:
    expected = theirs("mixtral", tmp_path, rank_pattern={"experts.gate_up_proj": 2}, use_rslora=True)
    model = mixture("mixtral")
    mmpeft.load_foreign(model, tmp_path)
    assert torch.allclose(answer(model), expected, atol=1e-4)


def test_a_router_is_a_matrix_among_the_parameters(tmp_path: Path) -> None:
    """PEFT makes `gate.weight` of it in "all-linear", which names it for every mixture of transformers."""
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    theirs_model = peft.get_peft_model(mixture("mixtral"), config).eval()
    add_noise(p for p in theirs_model.parameters() if p.requires_grad)
    theirs_model.save_pretrained(tmp_path)
    assert "gate.weight" in theirs_model.peft_config["default"].target_parameters
    model = mixture("mixtral")
    mmpeft.load_foreign(model, tmp_path)
    assert torch.allclose(answer(model), answer(theirs_model), atol=1e-4)


@pytest.mark.parametrize("experts", ["each", "shared"])
@pytest.mark.parametrize("model_type", TYPES)
def test_our_folder_gives_our_answers(model_type: str, experts: str, tmp_path: Path) -> None:
    model = mixture(model_type)
    tuning = attach(model, LoRA(at="{attn.q,expert.*}", rank=3, experts=experts))  # type: ignore[arg-type]
    add_noise(tuning.parameters())
    expected = answer(model)
    tuning.export(tmp_path / "folder")
    loaded = peft.PeftModel.from_pretrained(mixture(model_type), tmp_path / "folder").eval()
    assert torch.allclose(answer(loaded), expected, atol=1e-4)
    again = mixture(model_type)
    mmpeft.load_foreign(again, tmp_path / "folder")
    assert torch.allclose(answer(again), expected, atol=1e-4)


def test_one_parameter_of_two(tmp_path: Path) -> None:
    model = mixture("gpt_oss")
    tuning = attach(model, LoRA(at="expert.down", rank=3))
    add_noise(tuning.parameters())
    tuning.export(tmp_path / "folder")
    loaded = peft.PeftModel.from_pretrained(mixture("gpt_oss"), tmp_path / "folder").eval()
    assert torch.allclose(answer(loaded), answer(model), atol=1e-4)


def test_what_they_have_not_is_refused(tmp_path: Path) -> None:
    tuning = attach(mixture("mixtral"), DoRA(at="expert.down", rank=2))
    with pytest.raises(Refused, match="DoRA"):
        tuning.export(tmp_path / "folder")


def test_a_part_of_a_folder_is_no_folder(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs("mixtral", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "layers.0.mlp.experts.base_layer" not in k}, file)
    with pytest.raises(AdapterFileError, match="target_parameters"):
        mmpeft.load_foreign(mixture("mixtral"), tmp_path)

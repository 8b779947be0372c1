"""`target_modules=` names what PEFT's names: the same modules are tuned."""

from __future__ import annotations

from typing import Any

import pytest

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.methods.targets import selector_of
from mmpeft.run.written import read_method

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "target", [["q_proj", "v_proj"], ["self_attn.q_proj"], "all-linear", ["layers.1.mlp.down_proj"]], ids=str
)
def test_the_modules_of_peft(target: Any) -> None:
    ours, theirs = llama(), llama()
    mmpeft.attach(ours, mmpeft.LoRA(rank=2, target_modules=target))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM"))
    wanted = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert {placed.home for placed in mmpeft.tunings(ours)["default"].placements} == wanted
    assert mmpeft.tunings(ours)["default"].report().trainable == sum(
        p.numel() for p in wrapped.parameters() if p.requires_grad
    )


def test_written_as_a_call_and_kept_as_a_selector() -> None:
    method = read_method("LoRA(rank=2, target_modules=['q_proj'])")
    assert method == mmpeft.LoRA(rank=2, at="module=q_proj")


@pytest.mark.parametrize("target", [r".*\.(q|v)_proj", [], ["a b"], [3]])
def test_what_is_no_name_is_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        selector_of(target)
    with pytest.raises(ConfigError, match="not both"):
        mmpeft.LoRA(at="attn.q", target_modules=["q_proj"])

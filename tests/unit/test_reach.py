"""Which parts a forward pass enters, told without leaving a trace."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import mmpeft
from mmpeft.surgery.reach import reached
from tests.matrix.families import FAMILIES
from tests.matrix.families.transformers import LM, TOKENS, WORDS


def _decoder() -> tuple[hf.BertModel, torch.Tensor]:
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**LM, is_decoder=True, add_cross_attention=True))
    return model, torch.randint(3, WORDS, (2, TOKENS))


@pytest.mark.parametrize("method", [mmpeft.PTuningV2(tokens=3), mmpeft.LoRA(rank=2, at="attn.* | cross.*")], ids=str)
def test_cross_attention_that_nothing_is_attended_to_in_is_not_entered(method: mmpeft.Method) -> None:
    model, ids = _decoder()
    tuning = mmpeft.attach(model, method)
    missed = reached(model, tuning.placements, {"input_ids": ids})
    assert missed == [p for p in tuning.placements if "crossattention" in p.home]
    across = {"input_ids": ids, "encoder_hidden_states": torch.randn(2, 4, 32)}
    assert reached(model, tuning.placements, across) == []


@pytest.mark.parametrize(
    "method", [mmpeft.PromptTuning(tokens=3), mmpeft.BitFit(), mmpeft.IA3(), mmpeft.Houlsby()], ids=str
)
def test_all_parts_of_a_sound_tuning_are_entered(method: mmpeft.Method) -> None:
    example = FAMILIES["gpt2"]()
    tuning = mmpeft.attach(example.model, method)
    assert reached(example.model, tuning.placements, example.batch) == []


def test_an_attention_that_reads_its_config_and_calls_no_function_is_found() -> None:
    model = hf.ViTModel(hf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=3))
    attention = model.get_submodule(tuning.placements[0].home)
    cls = type(attention)
    silent = type("Silent", (cls,), {"forward": lambda self, x, *_, **__: (x * self.config.hidden_size, None)})
    attention.__class__ = silent
    try:
        pixels = {"pixel_values": torch.randn(1, 3, 224, 224)}
        assert reached(model, tuning.placements, pixels) == tuning.placements[:1]
    finally:
        attention.__class__ = cls


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.deltas = model, None
            self.count = torch.nn.Buffer(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.deltas = x
            self.new = 1
            return self.inner(x) + torch.rand(())

    whole = Counting().train()
    state = {n: t.clone() for n, t in whole.state_dict().items()}
    random = torch.get_rng_state()
    assert reached(whole, [], torch.randn(3, 4, generator=torch.Generator().manual_seed(0))) == []
    assert whole.deltas is None
    assert not hasattr(whole, "new")
    assert all(module.training for module in whole.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[n]) for n, t in whole.state_dict().items())

"""Prompts on language models agree with plain concatenation of embeddings, everywhere."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError, Refused
from mmpeft.parts import Delta
from mmpeft.surgery.state import state_of
from tests.matrix.families.transformers import FAMILIES, LM, T5, TOKENS, WORDS

P = 3
CAUSAL = ["llama", "gemma2", "phi", "phi3", "gpt2", "gpt_neox"]
NEW = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": WORDS + 1}


def _masks() -> dict[str, Tensor]:
    left = torch.ones(2, TOKENS, dtype=torch.long)
    left[0, :2] = 0
    return {"none": torch.ones_like(left), "left": left, "right": left.flip(1)}


def _tuned(family: str, method: mmpeft.Method) -> tuple[nn.Module, mmpeft.Tuning, Tensor]:
    model = FAMILIES[family]().model
    torch.manual_seed(0)
    tuning = mmpeft.attach(model, method)
    return model, tuning, torch.randint(3, WORDS, (2, TOKENS))


def _concatenated(model: nn.Module, tuning: mmpeft.Tuning, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What users do by hand: embeddings of prompt and text, one mask for both."""
    prompt = tuning.placements[0].part.embeddings()
    text = model.get_input_embeddings()(ids)
    embeds = torch.cat([prompt.to(text.dtype).expand(len(ids), -1, -1), text], dim=1)
    return {"inputs_embeds": embeds, "attention_mask": torch.cat([mask.new_ones(len(ids), P), mask], dim=1)}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_training_agrees_with_concatenation(family: str, padding: str) -> None:
    model, tuning, ids = _tuned(family, mmpeft.PromptTuning(tokens=P) + mmpeft.LoRA(rank=2))
    mask = _masks()[padding]
    parameters = list(tuning.parameters())
    weights = torch.randn(2, TOKENS, WORDS)[mask.bool()]
    ours = model(ids, attention_mask=mask).logits[mask.bool()]
    own = torch.autograd.grad((ours * weights).mean(), parameters)
    inputs = _concatenated(model, tuning, ids, mask)
    for placement in tuning.placements:  # the plain model with LoRA alone
        placement.part.resting = not isinstance(placement.part, Delta)
    state_of(model).replan()
    theirs = model(**inputs).logits[:, P:][mask.bool()]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(own, torch.autograd.grad((theirs * weights).mean(), parameters)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_generation_agrees_with_concatenation(family: str, padding: str, beams: int) -> None:
    model, tuning, ids = _tuned(family, mmpeft.PromptTuning(tokens=P))
    mask = _masks()[padding]
    ours = model.generate(ids, attention_mask=mask, num_beams=beams, **NEW)
    assert torch.equal(ours, model.generate(ids, attention_mask=mask, num_beams=beams, use_cache=False, **NEW))
    with mmpeft.use(model, None):
        theirs = model.generate(**_concatenated(model, tuning, ids, mask), num_beams=beams, **NEW)
    assert torch.equal(ours[:, TOKENS:], theirs)


def test_the_prompt_runs_once_in_a_generation_and_again_after_a_step() -> None:
    model, tuning, ids = _tuned("llama", mmpeft.PromptTuning(tokens=P))
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[1]))
    model.generate(ids, attention_mask=_masks()["none"], **NEW)
    assert runs == [P, TOKENS, 1, 1, 1, 1]
    with torch.no_grad():
        next(tuning.parameters()).add_(1.0)
        model(ids)
    assert runs[-2:] == [P, TOKENS]


def test_transformers_own_checkpointing() -> None:
    model, tuning, ids = _tuned("llama", mmpeft.PromptTuning(tokens=P))
    parameters = list(tuning.parameters())
    plain = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    model.gradient_checkpointing_enable()
    model.train()
    again = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    torch.testing.assert_close(plain, again, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_baking_keeps_what_the_encoder_makes(kind: str, tmp_path) -> None:
    model, tuning, ids = _tuned("phi", mmpeft.PTuning(tokens=P, reparameterisation=kind, hidden=8))
    before = model(ids).logits
    tuning.for_inference()
    assert [name for name, _ in tuning.named_parameters()] == ["ptuning.tokens"]
    baked = model(ids).logits
    torch.testing.assert_close(baked, before, atol=1e-6, rtol=1e-6)
    tuning.save(tmp_path)
    other = FAMILIES["phi"]().model
    mmpeft.load(other, tmp_path)
    assert torch.equal(other(ids).logits, baked)


def test_where_it_starts() -> None:
    model, tuning, _ = _tuned("gemma2", mmpeft.PromptTuning(tokens=5, init_ids=(7, 9)))
    words = model.get_input_embeddings()(torch.tensor([7, 9, 7, 9, 7]))
    assert torch.equal(tuning.placements[0].part.embeddings(), words)
    with pytest.raises(ConfigError, match="init_ids"):
        _tuned("llama", mmpeft.PromptTuning(init_ids=(WORDS,)))
    with pytest.raises(Refused, match="no way to lengthen"):
        _tuned("hf_clip", mmpeft.PromptTuning())


ENCODERS = {
    "bert": (hf.BertModel, hf.BertConfig, LM),
    "roberta": (hf.RobertaModel, hf.RobertaConfig, LM),
    "t5": (hf.T5EncoderModel, hf.T5Config, T5),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_agrees_with_concatenation_and_pools_the_text(family: str) -> None:
    cls, config, sizes = ENCODERS[family]
    torch.manual_seed(0)
    model = cls(config(**sizes)).eval()
    ids, mask = torch.randint(3, WORDS, (2, TOKENS)), _masks()["right"]
    tuning = mmpeft.attach(model, mmpeft.PromptTuning(tokens=P))
    (tokens,) = tuning.parameters()
    more = {} if family == "t5" else {"token_type_ids": torch.zeros_like(ids)}
    ours = model(ids, attention_mask=mask, output_hidden_states=True, **more)
    with mmpeft.use(model, None):
        theirs = model(**_concatenated(model, tuning, ids, mask), output_hidden_states=True)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state[:, P:])
    for a, b in zip(ours.hidden_states, theirs.hidden_states):
        torch.testing.assert_close(a, b[:, P:])
    weights = torch.randn(ours.last_hidden_state.shape)
    states = (ours.last_hidden_state, theirs.last_hidden_state[:, P:])
    own, other = (torch.autograd.grad((state * weights).sum(), tokens)[0] for state in states)
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    if family != "t5":
        torch.testing.assert_close(ours.pooler_output, model.pooler(ours.last_hidden_state))
        first = family == "roberta"  # its positions start behind that of padding
        again = model(ids, attention_mask=mask, position_ids=torch.arange(TOKENS)[None] + first)
        torch.testing.assert_close(again.last_hidden_state, ours.last_hidden_state)
        room = 16 - first
        model.embeddings.position_embeddings.num_embeddings = 16  # as if the table were that short
        with pytest.raises(ConfigError, match=f"more than the {room} positions"):
            model(torch.ones(1, room - P + 1, dtype=torch.long))


def test_a_prompt_before_the_encoder_of_a_pair() -> None:
    """The decoder attends to the prompt; generation runs the encoder by itself."""
    model, tuning, ids = _tuned("t5", mmpeft.PromptTuning(tokens=P))
    mask, told = _masks()["right"], torch.randint(3, WORDS, (2, 4))
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    inputs = _concatenated(model, tuning, ids, mask)
    options = {"max_new_tokens": 5, "do_sample": False, "decoder_start_token_id": 0, "eos_token_id": WORDS + 1}
    options["pad_token_id"] = 0
    for labels in ({"labels": told}, {"decoder_input_ids": told}):
        ours = model(ids, attention_mask=mask, **labels).logits
        with mmpeft.use(model, None):
            theirs = model(**inputs, **labels).logits
        torch.testing.assert_close(ours, theirs)
    for beams in (1, 3):
        ours = model.generate(ids, attention_mask=mask, num_beams=beams, **options)
        with mmpeft.use(model, None):
            assert torch.equal(ours, model.generate(**inputs, num_beams=beams, **options))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_with_a_prompt_for_each_row_is_refused(family: str) -> None:
    """One cache cannot hold rows of different lengths, and T5's encoder runs outside the model's own pass."""
    example = FAMILIES[family]()
    mmpeft.attach(example.model, mmpeft.PromptTuning(tokens=3))
    ids = torch.randint(1, 20, (2, 5))
    with mmpeft.use(example.model, ["default", None]), pytest.raises(ConfigError, match="one name at a time"):
        example.model.generate(input_ids=ids, max_new_tokens=2, decoder_start_token_id=0)
    assert example.model.generate(input_ids=ids, max_new_tokens=2, decoder_start_token_id=0).shape[0] == 2

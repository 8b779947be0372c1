"""Prompts and prefixes beside Hugging Face PEFT: answers, gradients, and files both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats.exchange import convert, export, inspect, load_foreign
from tests.matrix.example import enliven
from tests.matrix.families.transformers import GQA, LM, T5, TOKENS, WORDS

peft = pytest.importorskip("peft")

P = 3
BERT = LM | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GQA, "CAUSAL_LM"),
    "llama3": (hf.LlamaForCausalLM, hf.LlamaConfig, GQA | {"rope_parameters": LLAMA3}, "CAUSAL_LM"),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, LM, "CAUSAL_LM"),
    "neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, LM, "CAUSAL_LM"),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS},
        "CAUSAL_LM",
    ),
    "classifier": (hf.LlamaForSequenceClassification, hf.LlamaConfig, GQA, "SEQ_CLS"),
    "bert": (hf.BertForTokenClassification, hf.BertConfig, BERT, "TOKEN_CLS"),
    "roberta": (hf.RobertaForTokenClassification, hf.RobertaConfig, BERT, "TOKEN_CLS"),
    "pooled": (hf.BertForSequenceClassification, hf.BertConfig, BERT, "SEQ_CLS"),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5, "SEQ_2_SEQ_LM"),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GQA, "CAUSAL_LM"),
}
CONFIGS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P),
    "lstm": lambda task: _p_tuning(task, "LSTM"),
    "mlp": lambda task: _p_tuning(task, "MLP"),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
    "prefix mlp": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=12
    ),
}


def _p_tuning(task: str, kind: str) -> Any:
    return peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=P,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=8,
    )


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    cls, config, sizes, task = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(**sizes)).eval()
        enliven(model)
        batch = {"input_ids": torch.randint(3, WORDS, (2, TOKENS))}
        mask = torch.ones(2, TOKENS, dtype=torch.long)
        if task != "SEQ_CLS":
            mask[1, -2:] = 0
        batch["attention_mask"] = mask
        if family == "t5":
            batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    return model, batch


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the words that are no padding."""
    logits: Tensor = model(**batch).logits
    if logits.dim() == 3:
        logits = logits[:, -TOKENS:]
        return logits if "decoder_input_ids" in batch else logits[batch["attention_mask"].bool()]
    return logits


def wrapped(family: str, kind: str) -> tuple[Any, dict[str, Tensor]]:
    model, batch = build(family)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = peft.get_peft_model(model, CONFIGS[kind](FAMILIES[family][3])).eval()
    return made, batch


def gradients(y: Tensor, parameters: Any) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return list(torch.autograd.grad((y * weights).mean(), list(parameters)))


close = torch.testing.assert_close
runs = pytest.mark.skipif(
    "past_key_values" not in signature(hf.BertModel.forward).parameters,
    reason="PEFT looks for past_key_values in the arguments of encoders and classifiers; transformers 5.24 has cache",
)

WORKING = [
    *((family, kind) for family in ("llama", "bert", "t5") for kind in ("prompt", "lstm", "mlp")),
    *((family, "prefix") for family in ("llama", "llama3", "phi", "neox")),
    pytest.param("classifier", "prefix", marks=runs),
    *((family, "prompt") for family in ("gpt2", "roberta", "classifier", "gemma2")),
    ("llama", "prefix mlp"),
]


@pytest.mark.parametrize(("family", "kind"), WORKING)
def test_files_both_ways(family: str, kind: str, tmp_path: Path) -> None:
    theirs, batch = wrapped(family, kind)
    y = answer(theirs, batch).detach()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model, _ = build(family)
    plain = answer(model, batch)
    assert (plain - y).abs().max() > 1e-3
    tuning = load_foreign(model, tmp_path / "theirs")
    close(answer(model, batch), y, atol=1e-5, rtol=1e-5)
    assert inspect(tmp_path / "theirs").method == theirs.active_peft_config.peft_type.value

    written = export(tuning, tmp_path / "ours")
    assert [name.split()[0] for name in written.verified_by] == ["mmpeft", "peft"]
    assert written.difference < 1e-5
    base, _ = build(family)
    close(answer(peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval(), batch), y, atol=1e-5, rtol=1e-5)
    other, _ = build(family)
    load_foreign(other, tmp_path / "ours")
    close(answer(other, batch), y, atol=1e-5, rtol=1e-5)


OURS = [
    ("llama", mmpeft.PrefixTuning(tokens=P, hidden=8)),
    ("phi", mmpeft.PTuningV2(tokens=P)),
    ("llama", mmpeft.PTuning(tokens=P, hidden=8)),
    ("bert", mmpeft.PromptTuning(tokens=P) + mmpeft.LinearProbe()),
    pytest.param("classifier", mmpeft.PTuningV2(tokens=P) + mmpeft.LinearProbe(), marks=runs),
]


@pytest.mark.parametrize(("family", "method"), OURS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_ours_in_peft(family: str, method: mmpeft.Method, tmp_path: Path) -> None:
    model, batch = build(family)
    torch.manual_seed(1)
    tuning = mmpeft.attach(model, method)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    y = answer(model, batch)
    assert "peft" in export(tuning, tmp_path).verified_by[1]
    base, _ = build(family)
    close(answer(peft.PeftModel.from_pretrained(base, str(tmp_path)).eval(), batch), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("kind", ["prompt", "lstm", "mlp"])
def test_gradients_of_prompts(family: str, kind: str) -> None:
    theirs, batch = wrapped(family, kind)
    encoder = theirs.prompt_encoder["default"]
    model, _ = build(family)
    if kind == "prompt":
        tuning = mmpeft.attach(model, mmpeft.PromptTuning(tokens=P))
    else:
        tuning = mmpeft.attach(model, mmpeft.PTuning(tokens=P, reparameterisation=kind, hidden=8))
    own = list(tuning.parameters())
    pairs = list(encoder.parameters())
    with torch.no_grad():
        for mine, other in zip(own, pairs, strict=True):  # ours, then LSTM, then MLP: the order of both
            mine.copy_(other[: len(mine)])
    ours, y = answer(model, batch), answer(theirs, batch)
    close(ours, y, atol=1e-5, rtol=1e-5)
    for mine, other in zip(gradients(ours, own), gradients(y, pairs)):
        close(mine, other[: len(mine)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_gradients_of_prefixes(family: str, tmp_path: Path) -> None:
    """Of keys through the rotation between the two conventions."""
    theirs, batch = wrapped(family, "prefix")
    theirs.save_pretrained(str(tmp_path))
    (weight,) = theirs.prompt_encoder["default"].parameters()
    model, _ = build(family)
    tuning = load_foreign(model, tmp_path)
    own = gradients(answer(model, batch), tuning.parameters())
    (other,) = gradients(answer(theirs, batch), [weight])
    sites = {site.path: site for site in mmpeft.sites.sites(model) if site.role == "kv"}
    for i, (placement, gradient) in enumerate(zip(tuning.placements, own)):
        _, count, heads, width = gradient.shape
        keys, values = other.view(count, -1, 2, heads, width)[:, i].unbind(1)
        site = sites[placement.home]
        close(gradient[0], site.connect.shift(model, site, keys, -count), atol=1e-5, rtol=1e-5)
        close(gradient[1], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("bert", marks=runs)])
def test_prefixes_agree_where_the_text_is_moved_by_hand(family: str) -> None:
    """Learned positions: the one difference is where the text stands, and files are refused for it."""
    theirs, batch = wrapped(family, "prefix")
    (weight,) = theirs.prompt_encoder["default"].parameters()
    model, _ = build(family)
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P))
    layers = weight.detach().view(P, 2, 2, 4, 8).permute(1, 2, 0, 3, 4)
    with torch.no_grad():
        for parameter, layer in zip(tuning.parameters(), layers):
            parameter.copy_(layer)
    moved = batch | {"position_ids": torch.arange(P, P + TOKENS)[None]}
    ours, y = answer(model, moved), answer(theirs, batch)
    close(ours, y, atol=1e-5, rtol=1e-5)
    (other,) = gradients(y, [weight])
    mine = torch.stack(gradients(ours, tuning.parameters())).permute(2, 0, 1, 3, 4).flatten(1)
    close(mine, other, atol=1e-5, rtol=1e-5)


REFUSED = [
    ("gpt2", "prefix", "are no rotation"),
    ("bert", "prefix", "are no rotation"),
    ("t5", "prefix", "decoder's self-attention alone"),
    ("gemma2", "prefix", "sliding window"),
    ("pooled", "prompt", "pooled from its first position"),
]


@pytest.mark.parametrize(("family", "kind", "why"), REFUSED)
def test_what_peft_would_compute_otherwise_is_refused(family: str, kind: str, why: str, tmp_path: Path) -> None:
    theirs, _ = wrapped(family, kind)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model, _ = build(family)
    with pytest.raises(AdapterFileError, match=why):
        load_foreign(model, tmp_path / "theirs")
    assert not mmpeft.tunings(model)
    tuning = mmpeft.attach(model, mmpeft.PTuningV2(tokens=P) if kind == "prefix" else mmpeft.PromptTuning(tokens=P))
    with pytest.raises(Refused, match=why):
        export(tuning, tmp_path / "ours")


def test_a_model_whose_attention_takes_no_prefix_is_named(tmp_path: Path) -> None:
    config = hf.BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=1, n_head=2)
    peft.get_peft_model(hf.BloomForCausalLM(config), CONFIGS["prefix"]("CAUSAL_LM")).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="learned keys have no way in"):
        load_foreign(hf.BloomForCausalLM(config).eval(), tmp_path)


def test_unfit_folders(tmp_path: Path) -> None:
    theirs, _ = wrapped("llama", "prefix")
    theirs.save_pretrained(str(tmp_path / "prefix"))
    model, _ = build("phi")
    with pytest.raises(AdapterFileError, match="64 values a token, the model takes 128"):
        load_foreign(model, tmp_path / "prefix")
    convert(tmp_path / "prefix", tmp_path / "again", "peft")
    with pytest.raises(Refused, match="learned tokens"):
        convert(tmp_path / "prefix", tmp_path / "x.safetensors", "kohya")
    base, _ = build("llama")
    tuning = load_foreign(copy.deepcopy(base), tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").exists()
    both = mmpeft.attach(base, mmpeft.PromptTuning(tokens=P) + mmpeft.LoRA(rank=2))
    with pytest.raises(Refused, match="beside other parts"):
        export(both, tmp_path / "x")
    some = mmpeft.attach(base, mmpeft.PTuningV2(tokens=P, at="kv & depth=0"), "some")
    with pytest.raises(Refused, match="in each of 2 attentions; this tuning in 1"):
        export(some, tmp_path / "x")
    assert tuning.method == mmpeft.PrefixTuning(tokens=P, hidden=0)

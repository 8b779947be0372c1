"""PEFT folders that hold more than updates: what PEFT puts into a model when it reloads them, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import AdapterFileError, MMPEFTWarning, Refused
from mmpeft.formats.exchange import export, load_foreign
from tests.support.moved import add_noise

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IDS = torch.arange(14).view(2, 7) * 3 % 39 + 1


def llama(**known: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **known))


def opt() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, max_position_embeddings=16, word_embed_proj_dim=16)
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))


def mlm() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def t5() -> nn.Module:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def grown(seed: int) -> nn.Module:
    """Words were added, which start at random."""
    model: Any = build("llama")
    torch.manual_seed(seed)
    model.resize_token_embeddings(44, mean_resizing=False)
    return model.eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": partial(llama, tie_word_embeddings=True),
    "opt": opt,
    "bert": bert,
    "mlm": mlm,
    "t5": t5,
    "gpt2": gpt2,
}


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def build(family: str) -> nn.Module:
    if family.startswith("grown"):
        return grown(int(family[5:]))
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    batch = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    logits: Tensor = model(**batch).logits
    return logits


QV = ["q_proj", "v_proj"]
LORA = partial(peft.LoraConfig, r=4, lora_alpha=6, target_modules=QV)
ADA = partial(peft.AdaLoraConfig, init_r=4, target_r=2, lora_alpha=20, total_step=10, target_modules=QV)
FILES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "AdaLoRA": ("llama", ADA, {}),
    "AdaLoRA after pruning": ("llama", ADA, {"prune": True}),
    "AdaLoRA, turned": ("gpt2", partial(ADA, target_modules=["c_attn"], fan_in_fan_out=True), {}),
    "bias of what is tuned": ("opt", partial(LORA, bias="lora_only"), {}),
    "all biases": ("opt", partial(LORA, bias="all"), {}),
    "all biases beside a head": ("bert", partial(LORA, bias="all", target_modules=["query"], task_type="SEQ_CLS"), {}),
    "bias of DoRA": ("opt", partial(LORA, bias="lora_only", use_dora=True), {}),
    "bias inside, on a bias": ("opt", partial(LORA, lora_bias=True), {}),
    "bias inside, where none is": ("llama", partial(LORA, lora_bias=True), {}),
    "whole table and head": ("llama", partial(LORA, modules_to_save=["embed_tokens", "lm_head"]), {}),
    "whole table and head, tied": ("tied", partial(LORA, modules_to_save=["embed_tokens", "lm_head"]), {}),
    "whole head, tied": ("tied", partial(LORA, modules_to_save=["lm_head"]), {}),
    "kept tied": ("tied", partial(LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True), {}),
    "kept tied from the head": ("tied", partial(LORA, modules_to_save=["lm_head"], ensure_weight_tying=True), {}),
    "LoRA of the head": ("llama", partial(LORA, target_modules=["q_proj", "lm_head"]), {}),
    "LoRA of the head, tied": ("tied", partial(LORA, target_modules=["q_proj", "lm_head"]), {}),
    "LoRA of table and head, tied": ("tied", partial(LORA, target_modules=["embed_tokens", "lm_head"]), {}),
    "LoRA kept tied": ("tied", partial(LORA, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), {}),
    "DoRA of the head": ("llama", partial(LORA, target_modules=["lm_head"], use_dora=True), {}),
    "LoRA of a grown table": ("grown5", partial(LORA, target_modules=["q_proj", "embed_tokens"]), {"onto": "grown6"}),
    "LoRA of both, grown": ("grown5", partial(LORA, target_modules=["embed_tokens", "lm_head"]), {"onto": "grown6"}),
    "a saved vocabulary": ("grown5", LORA, {"onto": "grown6", "save_embedding_layers": True}),
    "a saved vocabulary, tied": ("tied", LORA, {"save_embedding_layers": True}),
    "words": ("llama", partial(LORA, trainable_token_indices=[4, 1, 2]), {}),
    "words, tied": ("tied", partial(LORA, trainable_token_indices=[4, 1, 2]), {}),
    "words of table and head": (
        "llama",
        partial(LORA, trainable_token_indices={"embed_tokens": [1, 4], "lm_head": [2]}),
        {},
    ),
    "words of the head alone, tied": ("tied", partial(LORA, trainable_token_indices={"lm_head": [1, 4]}), {}),
    "other words of table and head, tied": (
        "tied",
        partial(LORA, trainable_token_indices={"embed_tokens": [1, 4], "lm_head": [7]}),
        {},
    ),
    "words alone, of the head, tied": (
        "tied",
        partial(peft.TrainableTokensConfig, token_indices=[4, 1], target_modules=["lm_head"]),
        {},
    ),
    "a module saved whole around a target": (
        "llama",
        partial(LORA, target_modules=["q_proj", "down_proj"], modules_to_save=["mlp"]),
        {},
    ),
    "a head saved whole, with two names of its bias": (
        "mlm",
        partial(LORA, target_modules=["query"], modules_to_save=["cls"]),
        {},
    ),
    "LoHa beside a head": ("llama", partial(peft.LoHaConfig, target_modules=QV, modules_to_save=["lm_head"]), {}),
    "LoKr of the head": ("gpt2", partial(peft.LoKrConfig, r=2, target_modules=["lm_head"]), {}),
    "matrices by parameter": (
        "llama",
        partial(LORA, target_modules=["v_proj"], target_parameters=["q_proj.weight"]),
        {},
    ),
    "matrices by parameter, turned": (
        "gpt2",
        partial(LORA, target_modules=[], target_parameters=["c_attn.weight"]),
        {},
    ),
    "words alone, tied": ("tied", partial(peft.TrainableTokensConfig, token_indices=[4, 1, 7]), {}),
    "T5": ("t5", partial(LORA, target_modules=["q", "wo", "lm_head"]), {}),
    "IA3 of BERT": ("bert", partial(peft.IA3Config, task_type="SEQ_CLS"), {}),
    "IA3 of outputs": (
        "llama",
        partial(peft.IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
        {},
    ),
    "IA3 of inputs": (
        "llama",
        partial(peft.IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["k_proj"]),
        {},
    ),
    "VeRA": ("llama", partial(peft.VeraConfig, r=4, target_modules=QV), {}),
    "norms": ("bert", partial(peft.LNTuningConfig, target_modules=["LayerNorm"], task_type="SEQ_CLS"), {}),
}


@pytest.mark.parametrize("name", FILES)
def test_what_peft_reloads(name: str, tmp_path: Path) -> None:
    """Read as PEFT does, and written again so that PEFT reads the same."""
    family, config, more = FILES[name]
    more = dict(more)
    onto, prune = more.pop("onto", family), more.pop("prune", False)
    wrapped = peft.get_peft_model(build(family), config()).eval()
    add_noise(p for p in wrapped.parameters() if p.requires_grad)
    if prune:
        energies = [n.removeprefix("base_model.model.") for n, _ in wrapped.named_parameters() if "lora_E" in n]
        kept = [[False] * 4, [True, False, True, True]]
        wrapped.peft_config["default"].rank_pattern = {n: kept[i % 2] for i, n in enumerate(energies)}
        wrapped.base_model.resize_modules_by_rank_pattern(wrapped.peft_config["default"].rank_pattern, "default")
    wrapped.save_pretrained(str(tmp_path / "theirs"), **more)
    plain = run(build(onto))
    wanted = run(peft.PeftModel.from_pretrained(build(onto), str(tmp_path / "theirs")).eval())
    assert (wanted - plain).abs().max() > 5e-3
    model = build(onto)
    tuning = load_foreign(model, tmp_path / "theirs", strict=True)
    torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-5)
    written = export(tuning, tmp_path / "ours")
    assert [reader.split()[0] for reader in written.verified_by] == ["mmpeft", "peft"]
    back = run(peft.PeftModel.from_pretrained(build(onto), str(tmp_path / "ours")).eval())
    torch.testing.assert_close(back, wanted, atol=1e-5, rtol=1e-5)


def test_keys_of_a_state_dict(tmp_path: Path) -> None:
    """They have the adapter's name in them, as a checkpoint of a wrapped model has; PEFT reads its usual one."""
    wrapped = peft.get_peft_model(build("llama"), LORA()).eval()
    add_noise(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(str(tmp_path))
    kept = {name: tensor.clone() for name, tensor in wrapped.state_dict().items() if ".lora_" in name}
    assert all(".default." in name for name in kept)
    save_file(kept, tmp_path / "adapter_model.safetensors")
    model = build("llama")
    load_foreign(model, tmp_path, strict=True)
    torch.testing.assert_close(run(model), run(wrapped), atol=1e-5, rtol=1e-5)


def test_a_saved_vocabulary_does_not_train(tmp_path: Path) -> None:
    """It is the base that the file brings along, as it is in PEFT."""
    wrapped = peft.get_peft_model(build("grown5"), LORA())
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=True)
    tuning = load_foreign(build("grown6"), tmp_path)
    trained = sum(p.numel() for p in tuning.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    same = load_foreign(build("grown5"), tmp_path)
    assert sum(p.numel() for p in same.parameters()) == trained


def test_a_grown_vocabulary_on_the_base_without(tmp_path: Path) -> None:
    peft.get_peft_model(build("grown5"), LORA()).save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(
        AdapterFileError, match=r"shape \(44, 16\), the model's has \(40, 16\).*resize_token_embeddings\(44\)"
    ):
        load_foreign(build("llama"), tmp_path)


TABLE = "param & path=model.embed_tokens.weight"
OURS: dict[str, tuple[str, mmpeft.Method]] = {
    "norms alone": ("llama", mmpeft.NormTuning()),
    "biases alone": ("opt", mmpeft.BitFit(create=False)),
    "biases of fused rows": ("gpt2", mmpeft.BitFit(at="attn.{q,v}", create=False) + mmpeft.LoRA(at="mlp.*")),
    "biases beside LoRA": ("opt", mmpeft.LoRA(at="attn.q|mlp.*") + mmpeft.BitFit()),
    "biases beside (IA)³": ("opt", mmpeft.IA3() + mmpeft.BitFit(create=False)),
    "new biases": ("llama", mmpeft.LoRA(at="attn.{q,v}") + mmpeft.BitFit(at="attn.q")),
    "a head": ("bert", mmpeft.LinearProbe()),
    "LoRA and all of one weight": ("llama", mmpeft.LoRA(at="attn.q") + mmpeft.Full(at="attn.q")),
    "table and head, tied": ("tied", mmpeft.LoRA() + mmpeft.Full(at=f"{TABLE}|param & path=lm_head.weight")),
    "table alone, tied": ("tied", mmpeft.LoRA() + mmpeft.Full(at=TABLE)),
    "new words": ("tied", mmpeft.LoRA() + mmpeft.TextualInversion(words=3)),
    "new words alone": ("llama", mmpeft.TextualInversion(words=3)),
    "ranks that differ": (
        "llama",
        mmpeft.LoRA(rank=4, alpha=6, rank_pattern={"attn.q": 2}, alpha_pattern={"attn.v": 1}),
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft(name: str, tmp_path: Path) -> None:
    family, method = OURS[name]
    model = build(family)
    tuning = mmpeft.attach(model, method)
    add_noise(tuning.parameters())
    wanted = run(model)
    written = export(tuning, tmp_path)
    assert [reader.split()[0] for reader in written.verified_by] == ["mmpeft", "peft"]
    theirs = run(peft.PeftModel.from_pretrained(build(family), str(tmp_path)).eval())
    torch.testing.assert_close(theirs, wanted, atol=1e-5, rtol=1e-5)
    other = build(family)
    load_foreign(other, tmp_path, strict=True)
    torch.testing.assert_close(run(other), wanted, atol=1e-5, rtol=1e-5)


def test_a_bias_beside_rows_of_its_head_stays_and_is_said(tmp_path: Path) -> None:
    """PEFT's layer of trained rows has no bias; its merged model has."""
    config = LORA(target_modules=["query"], trainable_token_indices={"decoder": [1, 4]})
    peft.get_peft_model(build("mlm"), config).save_pretrained(str(tmp_path))
    model = build("mlm")
    plain = run(model)
    with pytest.warns(MMPEFTWarning, match="cls.predictions.decoder has rows of its own and a bias"):
        load_foreign(model, tmp_path)
    torch.testing.assert_close(run(model), plain, atol=1e-5, rtol=1e-5)


def test_a_new_bias_needs_an_update_to_be_in(tmp_path: Path) -> None:
    tuning = mmpeft.attach(build("llama"), mmpeft.BitFit(at="attn.q"))
    with pytest.raises(Refused, match="has got a bias, for which PEFT has a place in a low-rank update only"):
        export(tuning, tmp_path)


def test_what_servers_make_of_a_folder_is_said(tmp_path: Path) -> None:
    """As their own readers did in benchmarks/readers: norms and lengths are refused there, or dropped."""
    plain = export(mmpeft.attach(build("llama"), mmpeft.LoRA()), tmp_path / "plain")
    wide = export(mmpeft.attach(build("llama"), mmpeft.LoRA(rank=24)), tmp_path / "wide")
    norms = export(mmpeft.attach(build("llama"), mmpeft.LoRA() + mmpeft.NormTuning()), tmp_path / "norms")
    assert not plain.notes
    assert "--max-lora-rank 32" in wide.notes[0]
    assert norms.notes[0].startswith("whole modules: PEFT and transformers read that; vLLM refuses it")


def test_one_name_of_a_tied_tensor_in_part(tmp_path: Path) -> None:
    """PEFT writes into the tensor itself, and so under the other name too."""
    tuning = mmpeft.attach(build("tied"), mmpeft.LoRA(at="embed") + mmpeft.Full(at=TABLE))
    with pytest.raises(Refused, match=r"embed_tokens.weight is trained and lm_head.weight, the same tensor, is not"):
        export(tuning, tmp_path)


def test_written_folders_have_one_rank_and_one_scale(tmp_path: Path) -> None:
    """llama.cpp divides one alpha by each tensor's rank, SGLang knows no patterns and no regular expressions."""
    import json

    torch.manual_seed(0)
    config = transformers.Phi3Config(**SIZES, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    tuning = mmpeft.attach(transformers.Phi3ForCausalLM(config), mmpeft.LoRA(at="attn.*|mlp.*", rank=4, alpha=6))
    add_noise(tuning.parameters())
    export(tuning, tmp_path)
    known = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {12}  # q, k and v of one projection
    assert (known["r"], known["lora_alpha"], known["rank_pattern"], known["alpha_pattern"]) == (12, 12, {}, {})
    assert isinstance(known["target_modules"], list)
    auto = {"base_model_class": "Phi3ForCausalLM", "parent_library": "transformers.models.phi3.modeling_phi3"}
    assert known["auto_mapping"] == auto  # AutoPeftModel builds its base by it
    again = load_foreign(copy.deepcopy(transformers.Phi3ForCausalLM(config)), tmp_path)
    ranks = {len(p.part.factor.A) for p in again.placements}
    assert ranks == {4}  # and the zeros are no part of it

"""Folders of MLX and AdapterHub: names and layouts as their libraries have them, and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats import hub_out
from mmpeft.formats.exchange import convert, export, inspect, load_foreign, needs_model

transformers = pytest.importorskip("transformers")
IDS = torch.arange(1, 9)[None]
SIZES: dict[str, Any] = {
    **{"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "max_position_embeddings": 16},
}


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    return _seeded(transformers.LlamaForCausalLM, config)


def gpt2() -> nn.Module:
    words = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=3, n_head=2, n_positions=16, **words)
    return _seeded(transformers.GPT2LMHeadModel, config)


def bert() -> nn.Module:
    return _seeded(transformers.BertModel, transformers.BertConfig(**SIZES))


def _seeded(cls: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * 0.2
    return model


def tuned(model: nn.Module, method: mmpeft.Method) -> mmpeft.Tuning:
    tuning = mmpeft.attach(model, method)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in tuning.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    return tuning


def said(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS)[0]
    return found


def config_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


def shapes(file: Path) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in load_file(file).items()}


# -- MLX ----------------------------------------------------------------------------------------------------

LLAMA = {"q": "model.layers.2.self_attn.q_proj", "up": "model.layers.2.mlp.up_proj"}


def test_mlx_names_and_layout(tmp_path: Path) -> None:
    """Two ranks are padded; names within a block, for the last of them."""
    method = mmpeft.LoRA(at="{attn.q,mlp.up} & depth>1", rank=3, alpha=6, rank_pattern={"attn.q": 2})
    tuning = tuned(llama(), method)
    tuning.export(tmp_path / "a", format="mlx")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert config_of(tmp_path / "a") == {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": ["mlp.up_proj", "self_attn.q_proj"], "rank": 3, "scale": 1.0},
        "model": None,
        "num_layers": 1,
    }
    assert shapes(tmp_path / "a" / "adapters.safetensors") == {
        f"{LLAMA['q']}.lora_a": [8, 3],
        f"{LLAMA['q']}.lora_b": [3, 8],
        f"{LLAMA['up']}.lora_a": [8, 3],
        f"{LLAMA['up']}.lora_b": [3, 12],
    }
    tuned(llama(), mmpeft.LoRA(at="attn.q & depth=0")).export(tmp_path / "b", format="mlx")
    first = config_of(tmp_path / "b")  # others have queries, too
    assert first["lora_parameters"]["keys"] == ["model.layers.0.self_attn.q_proj"]
    tuned(gpt2(), mmpeft.DoRA(at="mlp.up", rank=2)).export(tmp_path / "c", format="mlx")
    own = shapes(tmp_path / "c" / "adapters.safetensors")
    assert (own["model.h.0.mlp.c_fc.lora_a"], own["model.h.0.mlp.c_fc.m"]) == ([8, 2], [32])
    assert config_of(tmp_path / "c")["fine_tune_type"] == "dora"


MLX_METHODS = {
    "LoRA": mmpeft.LoRA(rank=2, alpha=3),
    "DoRA": mmpeft.DoRA(rank=2),
    "full": mmpeft.Full(at="attn.*|norm"),
    "norms": mmpeft.NormTuning(),
}


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("method", MLX_METHODS.values(), ids=MLX_METHODS)
def test_mlx_round_trip(method: mmpeft.Method, build: Any, tmp_path: Path) -> None:
    tuned(model := build(), method).export(tmp_path / "a", format="mlx")
    load_foreign(other := build(), tmp_path / "a")
    torch.testing.assert_close(said(other), said(model))
    assert not torch.allclose(said(other), said(build()))
    assert inspect(tmp_path / "a", build()).format == "mlx"
    assert needs_model(tmp_path / "a")


def mlx_folder(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    known = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": {"rank": 2, "scale": 1.5, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(known | fields))
    return folder


def pair(path: str, inputs: int, outputs: int, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(inputs, rank, generator=generator), torch.randn(rank, outputs, generator=generator)
    return {f"{path}.lora_a": a, f"{path}.lora_b": b}


def test_mlx_scale_is_the_factor_itself_and_a_tied_table_is_the_head(tmp_path: Path) -> None:
    tensors = pair("model.h.1.mlp.c_fc", 8, 32)
    load_foreign(model := gpt2(), mlx_folder(tmp_path / "a", tensors)).merge()
    a, b = tensors.values()
    moved = (
        model.get_submodule("transformer.h.1.mlp.c_fc").weight - gpt2().get_submodule("transformer.h.1.mlp.c_fc").weight
    )
    torch.testing.assert_close(moved, 1.5 * a @ b)  # transformers keeps [i, o] there
    tensors = pair("model.embed_tokens", 16, 8)
    folder = mlx_folder(tmp_path / "b", tensors)
    a, b = tensors.values()
    load_foreign(model := llama(tied=True), folder)
    by_hand = llama(tied=True)
    with torch.no_grad():
        by_hand.get_submodule("model.embed_tokens").weight += 1.5 * a @ b
    torch.testing.assert_close(said(model), said(by_hand))
    convert(mlx_folder(tmp_path / "c", pair(LLAMA["q"], 8, 8)), tmp_path / "d", "peft", model=llama())
    load_foreign(one := llama(), tmp_path / "c")
    load_foreign(two := llama(), tmp_path / "d")
    torch.testing.assert_close(said(one), said(two))


STACK = {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(4, 2, 8)}
BAD_MLX: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "experts": (STACK, {}, "an update of stacked experts"),
    "other key": ({"model.norm.weight": torch.ones(8)}, {}, "is no part of a lora update"),
    "alpha": (pair(LLAMA["q"], 8, 8), {"lora_parameters": {"rank": 2, "alpha": 4}}, "called scale there, not alpha"),
    "rank": (pair(LLAMA["q"], 8, 8, 3), {}, "has rank 3, its config says 2"),
    "lengths": (pair(LLAMA["q"], 8, 8), {"fine_tune_type": "dora"}, "lacks lengths `m`"),
    "type": (pair(LLAMA["q"], 8, 8), {"fine_tune_type": "lokr"}, "'lokr' is not read; supported: lora, dora, full"),
    "table": (
        pair("model.embed_tokens", 16, 8) | {"model.embed_tokens.m": torch.ones(16)},
        {"fine_tune_type": "dora"},
        "one DoRA length for each of 16 words",
    ),
}


@pytest.mark.parametrize("name", BAD_MLX)
def test_bad_mlx_folder(name: str, tmp_path: Path) -> None:
    tensors, fields, message = BAD_MLX[name]
    with pytest.raises(AdapterFileError, match=message):
        load_foreign(llama(), mlx_folder(tmp_path / "a", tensors, **fields))


UNFIT_MLX = [
    (mmpeft.LoRA() + mmpeft.NormTuning(), "mlx_lm reads one of them"),
    (mmpeft.LoRA(at="embed"), "mlx_lm has one module for both"),
    (mmpeft.IA3(), "mlx files hold low-rank layers only"),
    (mmpeft.Houlsby(), "Branch at .* exists in no exchange format"),
    (mmpeft.LoRA(at="attn.q") + mmpeft.DoRA(at="attn.v"), "both LoRA and DoRA"),
]


@pytest.mark.parametrize(("method", "message"), UNFIT_MLX)
def test_what_mlx_cannot_hold_is_refused(method: mmpeft.Method, message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message):
        tuned(llama(tied=True), method).export(tmp_path / "a", format="mlx")
    assert not (tmp_path / "a").exists()


# -- AdapterHub ---------------------------------------------------------------------------------------------

HUB_METHODS = {
    "Houlsby": mmpeft.Houlsby(reduction=2),
    "one block": mmpeft.Houlsby(at="attn & depth=1", bottleneck=3, activation="tanh"),
    "blocks": mmpeft.Pfeiffer(at="block", reduction=4),
    "parallel": mmpeft.ParallelAdapter(scale="scalar"),
    "LoRA": mmpeft.LoRA(at="attn.{q,v}", rank=2, alpha=3),
    "IA3": mmpeft.IA3(at="attn.{k,v}|mlp.up", side="output"),
}


@pytest.mark.parametrize("build", [bert, gpt2, llama])
@pytest.mark.parametrize("method", HUB_METHODS.values(), ids=HUB_METHODS)
def test_adapterhub_round_trip(method: mmpeft.Method, build: Any, tmp_path: Path) -> None:
    tuning = tuned(model := build(), method)
    if build is not bert and method is HUB_METHODS["parallel"]:
        with pytest.raises(Refused, match="those of adapters read the sum before the norm"):
            tuning.export(tmp_path / "a", format="adapterhub")
        return
    tuning.export(tmp_path / "a", format="adapterhub")
    load_foreign(other := build(), tmp_path / "a")
    torch.testing.assert_close(said(other), said(model))
    assert not torch.allclose(said(other), said(build()))
    assert inspect(tmp_path / "a").method == type(method).__name__
    assert inspect(tmp_path / "a").layers


def test_adapterhub_names_and_layout(tmp_path: Path) -> None:
    tuned(bert(), HUB_METHODS["one block"]).export(tmp_path / "a", format="adapterhub")
    own = "encoder.layer.1.attention.output.adapters.default"
    assert shapes(tmp_path / "a" / "adapter.safetensors") == {
        f"{own}.adapter_down.0.weight": [3, 8],
        f"{own}.adapter_down.0.bias": [3],
        f"{own}.adapter_up.weight": [8, 3],
        f"{own}.adapter_up.bias": [8],
    }
    facts = config_of(tmp_path / "a")
    config = facts["config"]
    assert (facts["model_type"], facts["hidden_size"], facts["model_class"]) == ("bert", 8, "BertModel")
    assert (config["mh_adapter"], config["output_adapter"], config["leave_out"]) == (True, False, [0, 2])
    assert (config["non_linearity"], int(8 // config["reduction_factor"])) == ("tanh", 3)
    tuned(gpt2(), HUB_METHODS["LoRA"]).export(tmp_path / "b", format="adapterhub")
    pairs = shapes(tmp_path / "b" / "adapter.safetensors")
    assert pairs["transformer.h.0.attn.c_attn.loras.default.lora_A"] == [4, 8]  # of q and of v
    assert pairs["transformer.h.0.attn.c_attn.loras.default.lora_B"] == [16, 2]
    assert config_of(tmp_path / "b")["config"]["attn_matrices"] == ["q", "v"]
    tuned(llama(), HUB_METHODS["blocks"]).export(tmp_path / "c", format="adapterhub")
    config = config_of(tmp_path / "c")["config"]
    assert [config[n] for n in ("original_ln_before", "original_ln_after", "residual_before_ln")] == [True] * 3
    assert "model.layers.0.output_adapters.adapters.default.adapter_up.bias" in load_file(
        tmp_path / "c" / "adapter.safetensors"
    )


def test_every_size_has_its_factor() -> None:
    assert all(int(w // hub_out.factor(w, size)) == size for w in (8, 768, 1000) for size in range(1, w + 1))
    assert math.isclose(hub_out.factor(768, 48), 16)


BAD_HUB: dict[str, tuple[dict[str, Any], str]] = {
    "seq_bn": ({"original_ln_before": True}, "the norm runs before the bottleneck and once more behind it"),
    "compacter": ({"phm_layer": True}, "phm_layer means Kronecker products"),
    "norm": ({"ln_after": True}, "ln_after means a norm of its own"),
    "prefix": ({"architecture": "prefix_tuning"}, "architecture 'prefix_tuning' is not read"),
    "activation": ({"non_linearity": "leakyrelu"}, "non_linearity 'leakyrelu' is not read"),
    "channel": ({"scaling": "channel"}, "scaling 'channel' is not read"),
    "learned": ({"scaling": "learned"}, "scaling.* should be there or not"),
}


@pytest.mark.parametrize("name", BAD_HUB)
def test_bad_adapterhub_folder(name: str, tmp_path: Path) -> None:
    export(tuned(bert(), HUB_METHODS["Houlsby"]), tmp_path / "a", "adapterhub")
    fields, message = BAD_HUB[name]
    facts = config_of(tmp_path / "a")
    facts["config"] |= fields
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(facts))
    with pytest.raises(AdapterFileError, match=message):
        load_foreign(bert(), tmp_path / "a")


def test_a_pickled_adapter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    export(tuned(bert(), HUB_METHODS["Houlsby"]), tmp_path / "a", "adapterhub")
    (tmp_path / "a" / "adapter.safetensors").rename(tmp_path / "a" / "pytorch_adapter.bin")
    with pytest.raises(AdapterFileError, match=r"safetensors.torch as s; s.save_file\(torch.load"):
        load_foreign(bert(), tmp_path / "a")


UNFIT_HUB = [
    (mmpeft.DoRA(), "that of adapters scales biases as well"),
    (mmpeft.IA3(), r"none on what enters encoder.layer.0.output.dense"),
    (mmpeft.LoRA(at="attn.out"), "no option for encoder.layer.0.attention.output.dense"),
    (mmpeft.Houlsby() + mmpeft.NormTuning(), "is no plain bottleneck"),
    (mmpeft.AdapterPlus(), "is no place for a bottleneck"),
    (mmpeft.LoRA(at="attn.q & depth=0") + mmpeft.LoRA(at="attn.v & depth=1"), "updates of different linears"),
]


@pytest.mark.parametrize(("method", "message"), UNFIT_HUB)
def test_what_adapterhub_cannot_hold_is_refused(method: mmpeft.Method, message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message):
        tuned(bert(), method).export(tmp_path / "a", format="adapterhub")


def test_models_that_mlx_renames_and_nobody_compared_are_refused(tmp_path: Path) -> None:
    model = _seeded(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SIZES))
    with pytest.raises(Refused, match="gpt_neox, which were not tried"):
        export(mmpeft.attach(model, mmpeft.LoRA(rank=1)), tmp_path / "mlx", "mlx")

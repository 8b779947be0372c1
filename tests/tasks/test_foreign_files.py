"""Files of whole pipelines as other tools write and read them: every layer finds its model, or is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmpeft
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.style.command import open_adapters
from mmpeft.errors import AdapterFileError, MMPEFTWarning, Refused, UnusedTensorsWarning
from mmpeft.formats.exchange import export_pipeline, load_foreign, load_parts
from mmpeft.formats.ldm import names_of
from tests.support.moved import attach_moved
from tests.tasks.saved_pipelines import LORA, drawn
from tests.tasks.tiny_pipelines import pipeline

TEXT = mmpeft.LoRA(rank=2, at="attn.{q,k,v,out}", alpha=1)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def halves(name: str, rows: int, columns: int, style: str = "kohya") -> dict[str, Tensor]:
    down, up = ("lora_down", "lora_up") if style == "kohya" else ("lora_A", "lora_B")
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.{down}.weight": torch.randn(2, columns, generator=generator),
        f"{name}.{up}.weight": torch.randn(rows, 2, generator=generator),
    }


UNET = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
LEFT = {
    "third encoder": ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "kohya", "'text_encoder_3'"),
    "second encoder": ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "diffusers", "'text_encoder_2'"),
    "misspelt": (f"unit.{UNET}", "diffusers", "no module|no place"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_layers_of_no_model_of_the_pipeline_are_an_error(kind: str, tmp_path: Path) -> None:
    name, style, said = LEFT[kind]
    good = f"lora_unet_{UNET}" if style == "kohya" else f"unet.{UNET}"
    save_file(halves(good, 16, 16, style) | halves(name, 16, 16, style), tmp_path / "a.safetensors")
    made = pipeline("sd")
    with pytest.raises(AdapterFileError, match=said):
        open_adapters(family_of(made), [tmp_path / "a.safetensors"])
    assert not mmpeft.tunings(made.unet)
    assert not mmpeft.tunings(made.text_encoder)


def test_an_encoder_that_was_left_out_of_the_pipeline_is_said(tmp_path: Path) -> None:
    layer = "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
    block = "transformer.transformer_blocks.0.attn.to_q"
    save_file(halves(block, 16, 16, "diffusers") | halves(layer, 16, 32, "diffusers"), tmp_path / "a.safetensors")
    made = pipeline("sd3")
    made.text_encoder_3 = None
    with pytest.warns(MMPEFTWarning, match="1 layers of text_encoder_3 are left out"):
        ((tuning,),) = open_adapters(family_of(made), [tmp_path / "a.safetensors"])
    assert tuning.model is made.transformer


def test_tensors_of_no_model_are_refused_on_request(tmp_path: Path) -> None:
    """Beside layers that fit: left with a warning, or `strict`."""
    unet = pipeline("sd").unet
    theirs = peft.get_peft_model(copy.deepcopy(unet), peft.LoraConfig(r=2, target_modules=["to_q"]))
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"bundle_emb.0": torch.ones(1)}, file)
    with pytest.raises(AdapterFileError, match=r"'bundle_emb.0'; strict=False loads the rest"):
        load_parts({"unet": unet}, tmp_path, strict=True)
    assert not mmpeft.tunings(unet)
    with pytest.warns(UnusedTensorsWarning, match="bundle_emb"):
        assert list(load_parts({"unet": unet}, tmp_path)) == ["unet"]


def test_a_bias_inside_an_update_where_the_layer_has_none(tmp_path: Path) -> None:
    """As PEFT's `lora_bias=True` leaves it in a pipeline's file; diffusers reads it."""
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        halves(name, 16, 16, "diffusers") | {f"{name}.lora_B.bias": torch.full((16,), 50.0)}, tmp_path / "a.safetensors"
    )
    made, theirs = pipeline("sd"), pipeline("sd")
    assert dict(made.unet.named_modules())[name.removeprefix("unet.")].bias is None
    open_adapters(family_of(made), [tmp_path / "a.safetensors"])
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    torch.testing.assert_close(drawn(made, "sd"), drawn(theirs, "sd"), **CLOSE)
    assert (drawn(made, "sd") - drawn(pipeline("sd"), "sd")).abs().max() > 1e-2


def test_a_file_of_a_text_encoder_alone(tmp_path: Path) -> None:
    save_file(halves("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 16, 16), tmp_path / "a.safetensors")
    made = pipeline("sd")
    ((tuning,),) = open_adapters(family_of(made), [tmp_path / "a.safetensors"])
    assert tuning.model is made.text_encoder


def test_the_names_that_sdxl_trainers_use(tmp_path: Path) -> None:
    """Against diffusers' own conversion of the same file."""
    made = pipeline("sdxl")
    modules = dict(made.unet.named_modules())
    tensors: dict[str, Tensor] = {}
    for i, (theirs, ours) in enumerate(names_of(modules).items()):
        weight = getattr(modules[ours], "weight", None)
        if weight is None or weight.dim() < 2 or ours in ("conv_in", "conv_out") or "emb" in theirs:
            continue
        name, shape = f"lora_unet_{theirs.replace('.', '_')}", weight.shape
        generator = torch.Generator().manual_seed(i)
        kernel = (1,) * (weight.dim() - 2)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=generator) * 0.2
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, *kernel, generator=generator) * 0.2
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    assert any("input_blocks_3_1_transformer_blocks" in name for name in tensors)
    assert any("output_blocks_1_2_conv" in name for name in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    open_adapters(family_of(made), [tmp_path / "a.safetensors"])
    theirs = pipeline("sdxl")
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    torch.testing.assert_close(drawn(made, "sdxl"), drawn(theirs, "sdxl"), **CLOSE)
    assert (drawn(made, "sdxl") - drawn(pipeline("sdxl"), "sdxl")).abs().max() > 1e-3


@pytest.mark.parametrize("up", [0.0, 1.0])
def test_updates_without_effect_are_left_out(up: float, tmp_path: Path) -> None:
    """The last block of SD3 reads no context: trainers of all layers write its `add_q_proj`, zero or not."""
    good, dead = (f"transformer.transformer_blocks.{i}.attn.add_q_proj" for i in (0, 1))
    tensors = halves(good, 16, 16, "diffusers") | halves(dead, 16, 16, "diffusers")
    tensors[f"{dead}.lora_B.weight"] *= up
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(MMPEFTWarning, match=r"1 of 2 updates have no effect .*_blocks\.1\.attn\.add_q_proj"):
        tuning = load_foreign(pipeline("sd3").transformer, tmp_path / "a.safetensors")
    assert len(tuning.placements) == 1


def tuned(kind: str) -> tuple[Any, dict[str, mmpeft.Tuning]]:
    """A pipeline whose denoiser and text encoders are all tuned."""
    made = pipeline(kind)
    family = family_of(made)
    tunings = {family.part: attach_moved(family.denoiser, LORA, by=0.3)}
    tunings |= {name: attach_moved(encoder, TEXT, by=0.3) for name, encoder in family.encoders.items()}
    return made, tunings


NAMES = {
    "sd3": (
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ),
    "flux": (
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_single_blocks_0_linear1",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_kohya_files_of_transformers_have_the_names_of_sd_scripts(kind: str, tmp_path: Path) -> None:
    made, tunings = tuned(kind)
    written = export_pipeline(tunings, tmp_path / "a.safetensors", "kohya")
    names = {name.partition(".")[0] for name in load_file(written.path)}
    assert set(NAMES[kind]) <= names
    assert all(name.startswith(("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_")) for name in names)
    again = pipeline(kind)
    ((*found,),) = open_adapters(family_of(again), [written.path])
    assert len(found) == len(tunings)
    torch.testing.assert_close(drawn(again, kind), drawn(made, kind), **CLOSE)


@pytest.mark.parametrize("kind", NAMES)
def test_text_encoders_beside_a_transformer_in_diffusers_own_layout(kind: str, tmp_path: Path) -> None:
    made, tunings = tuned(kind)
    t5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}[kind]
    with pytest.raises(Refused, match=f"a {t5} that is a T5"):
        export_pipeline(tunings, tmp_path / "a.safetensors", "diffusers")
    mmpeft.detach(tunings.pop(t5).model, "default")
    written = export_pipeline(tunings, tmp_path / "a.safetensors", "diffusers")
    assert any(reader.startswith("diffusers") for reader in written.verified_by)
    theirs = pipeline(kind)
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    torch.testing.assert_close(drawn(theirs, kind), drawn(made, kind), **CLOSE)


def test_kohya_files_of_other_transformers_are_refused(tmp_path: Path) -> None:
    tuning = attach_moved(pipeline("pixart").transformer, LORA, by=0.3)
    with pytest.raises(Refused, match="no reader of kohya's files is known to take a PixArtTransformer2DModel"):
        tuning.export(tmp_path / "a.safetensors", "kohya")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("method", [mmpeft.LoKr, mmpeft.KronA, mmpeft.LoHa], ids=lambda method: method.__name__)
def test_factors_of_parts_of_a_weight_are_written_as_what_they_equal(method: Any, format: Any, tmp_path: Path) -> None:
    """The first linear of every UNet's feed-forward network is a value and its gate, two sites of one module."""
    made = pipeline("sd")
    tuning = attach_moved(made.unet, method(at="attn.q|mlp.*"), by=0.3)
    written = tuning.export(tmp_path / "a.safetensors", format)
    assert "written as the LoRA that each equals" in written.notes[0]
    assert "of a rank up to" in written.notes[0]
    again = pipeline("sd")
    open_adapters(family_of(again), [written.path])
    torch.testing.assert_close(drawn(again, "sd"), drawn(made, "sd"), **CLOSE)

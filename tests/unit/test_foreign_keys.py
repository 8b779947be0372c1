"""Keys that other tools write beside plain low-rank layers: each has the effect that its writer gives it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmpeft
from mmpeft.errors import AdapterFileError, ConfigError, MMPEFTWarning, Refused
from mmpeft.formats.exchange import convert, export, inspect, load_foreign
from tests.unit.toy import Toy

PATH, FLAT = "blocks.0.q", "lora_unet_blocks_0_q"
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


DOWN, UP, SMALL = randn(2, 8), randn(8, 2, seed=2), randn(8, seed=3)
BASE = Toy().blocks[0].q.weight.detach()
DELTA = UP @ DOWN
COLUMNS = (BASE + DELTA).norm(dim=0, keepdim=True) * (1 + randn(1, 8, seed=4))
BLOCKS = randn(2, 4, 4, seed=5)
GLORA = {"a1.weight": randn(8, 2), "a2.weight": DOWN, "b1.weight": UP, "b2.weight": randn(2, 8, seed=6)}


def turned(constraint: float, rescale: Tensor | None = None) -> Tensor:
    """ΔW of LyCORIS's Diag-OFT, written out block by block."""
    q = BLOCKS - BLOCKS.transpose(1, 2)
    if constraint and q.norm() > constraint * 8:
        q = q * constraint * 8 / q.norm()
    turns = [(torch.eye(4) + one) @ (torch.eye(4) - one).inverse() for one in q]
    new = torch.block_diag(*[turn.T for turn in turns]) @ BASE
    return (new if rescale is None else rescale.view(8, 1) * new) - BASE


HALVES = {"lora_down.weight": DOWN, "lora_up.weight": UP}
KINDS: dict[str, tuple[dict[str, Tensor], Tensor | None, Tensor | None]] = {
    "columns": (HALVES | {"dora_scale": COLUMNS}, (BASE + DELTA) * COLUMNS / (BASE + DELTA).norm(dim=0) - BASE, None),
    "diff": ({"diff": randn(8, 8), "diff_b": SMALL}, randn(8, 8), SMALL),
    "diff and alpha": ({"diff": randn(8, 8), "alpha": torch.tensor(4.0)}, randn(8, 8), None),
    "diff_b": (HALVES | {"diff_b": SMALL}, DELTA, SMALL),
    "set_weight": ({"set_weight": randn(8, 8)}, randn(8, 8) - BASE, None),
    "GLoRA": (GLORA | {"alpha": torch.tensor(1.0)}, (BASE @ randn(8, 2) @ DOWN + UP @ randn(2, 8, seed=6)) / 2, None),
    "OFT": ({"oft_blocks": BLOCKS, "alpha": torch.tensor(0.0)}, turned(0.0), None),
    "OFT, bounded": ({"oft_blocks": BLOCKS, "alpha": torch.tensor(0.05)}, turned(0.05), None),
    "OFT, scaled": ({"oft_blocks": BLOCKS, "rescale": 1 + SMALL.view(8, 1)}, turned(0.0, 1 + SMALL), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris(kind: str, tmp_path: Path) -> None:
    own, weight, bias = KINDS[kind]
    save_file({f"{FLAT}.{name}": tensor for name, tensor in own.items()}, tmp_path / "a.safetensors")
    wanted = Toy()
    with torch.no_grad():
        wanted.blocks[0].q.weight += 0 if weight is None else weight
        wanted.blocks[0].q.bias += 0 if bias is None else bias
    load_foreign(model := Toy(), tmp_path / "a.safetensors")
    torch.testing.assert_close(model(X), wanted(X), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(model(X), Toy()(X), atol=1e-4)
    assert inspect(tmp_path / "a.safetensors", Toy()).unmatched == ()


def test_norms_and_a_bias_inside_the_update(tmp_path: Path) -> None:
    tensors = {"lora_unet_blocks_1_norm.w_norm": SMALL, "lora_unet_blocks_1_norm.b_norm": SMALL + 1}
    save_file(tensors, tmp_path / "a.safetensors")
    wanted = Toy()
    with torch.no_grad():
        wanted.blocks[1].norm.weight += SMALL
        wanted.blocks[1].norm.bias += SMALL + 1
    load_foreign(model := Toy(), tmp_path / "a.safetensors")
    torch.testing.assert_close(model(X), wanted(X), atol=1e-6, rtol=1e-5)
    halves = {"lora_A.weight": DOWN, "lora_B.weight": UP, "lora_B.bias": SMALL, "alpha": torch.tensor(4.0)}
    save_file({f"unet.{PATH}.{name}": tensor for name, tensor in halves.items()}, tmp_path / "b.safetensors")
    wanted = Toy()
    with torch.no_grad():
        wanted.blocks[0].q.weight += 2 * DELTA
        wanted.blocks[0].q.bias += 2 * SMALL
    load_foreign(model := Toy(), tmp_path / "b.safetensors")
    torch.testing.assert_close(model(X), wanted(X), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        (f"unet.base_model.model.{PATH}.lora_A.weight", f"unet.base_model.model.{PATH}.lora_B.weight"),
        (f"unet.{PATH}.lora_linear_layer.down.weight", f"unet.{PATH}.lora_linear_layer.up.weight"),
        (f"unet.{PATH}.lora_A.default.weight", f"unet.{PATH}.lora_B.default.weight"),
        (f"{PATH}.lora_A", f"{PATH}.lora_B"),
    ],
)
def test_spellings(names: tuple[str, str], tmp_path: Path) -> None:
    save_file(dict(zip(names, (DOWN, UP))), tmp_path / "a.safetensors")
    wanted = Toy()
    with torch.no_grad():
        wanted.blocks[0].q.weight += DELTA
    load_foreign(model := Toy(), tmp_path / "a.safetensors")
    torch.testing.assert_close(model(X), wanted(X), atol=1e-6, rtol=1e-5)


def test_layers_without_alpha_beside_others_have_the_scale_1_and_it_is_said(tmp_path: Path) -> None:
    tensors = {f"{FLAT}.{name}": tensor for name, tensor in HALVES.items()}
    tensors |= {f"lora_unet_blocks_1_q.{n}": t.clone() for n, t in (HALVES | {"alpha": torch.tensor(1.0)}).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    info = inspect(tmp_path / "a.safetensors")
    assert info.scales == {0.5: 1, 1.0: 1}
    said = "1 of 2 layers carry no alpha: scale 1, as ComfyUI and sd-scripts take it; diffusers gives them the alpha of"
    assert info.notes[0].startswith(said)
    with pytest.warns(MMPEFTWarning, match=said):
        load_foreign(Toy(), tmp_path / "a.safetensors")


def test_an_unknown_key_beside_good_ones_is_said(tmp_path: Path) -> None:
    tensors = {f"{FLAT}.{name}": tensor for name, tensor in HALVES.items()}
    save_file(tensors | {"bundle_emb.sks.string_to_param.*": SMALL}, tmp_path / "a.safetensors")
    with pytest.warns(MMPEFTWarning, match=r"1 keys are of no known kind, first 'bundle_emb\.sks"):
        assert len(load_foreign(Toy(), tmp_path / "a.safetensors").placements) == 1
    assert "left out" in inspect(tmp_path / "a.safetensors").notes[-1]
    with pytest.raises(AdapterFileError, match="strict=False"):
        mmpeft.load_foreign(Toy(), tmp_path / "a.safetensors", strict=True)


def test_what_needs_the_base_is_not_converted_without_it(tmp_path: Path) -> None:
    save_file({f"unet.{PATH}.oft_blocks": BLOCKS}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="changes the base by the base's own values; give the model"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", model=Toy(), prefix="unet")
    load_foreign(model := Toy(), tmp_path / "b.safetensors")
    load_foreign(other := Toy(), tmp_path / "a.safetensors")
    torch.testing.assert_close(model(X), other(X), atol=1e-6, rtol=1e-5)


def test_names_of_an_original_repository_are_not_written_without_a_model(tmp_path: Path) -> None:
    block = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{block}.lora_A.weight": DOWN, f"{block}.lora_B.weight": UP}, tmp_path / "a.safetensors")
    for format in ("diffusers", "kohya", "peft"):
        with pytest.raises(AdapterFileError, match="a name of an original repository"):
            convert(tmp_path / "a.safetensors", tmp_path / format, format)  # type: ignore[arg-type]
        assert not (tmp_path / format).exists()


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_names_of_no_known_model_are_not_written_as_a_unets(format: Any, tmp_path: Path) -> None:
    """ComfyUI's `diffusion_model.` stands for any denoiser; most have other names in diffusers."""
    halves = {"lora_A.weight": DOWN, "lora_B.weight": UP}
    for place in ("blocks.0.self_attn.q", "down_blocks.1.attentions.0.to_q"):
        file = tmp_path / f"{place[:4]}.safetensors"
        save_file({f"diffusion_model.{place}.{name}": tensor for name, tensor in halves.items()}, file)
    with pytest.raises(
        AdapterFileError, match=r"blocks\.0\.self_attn\.q is of no named model .* give the model, or prefix="
    ):
        convert(tmp_path / "bloc.safetensors", tmp_path / "out.safetensors", format)
    assert not (tmp_path / "out.safetensors").exists()
    assert convert(tmp_path / "bloc.safetensors", tmp_path / "a.safetensors", format, prefix="unet").layers == 1
    assert convert(tmp_path / "down.safetensors", tmp_path / "b.safetensors", format).layers == 1


@pytest.mark.parametrize(
    "method",
    [
        mmpeft.BitFit(create=False),
        mmpeft.NormTuning(),
        mmpeft.Full(at="attn.q"),
        mmpeft.BitFit(create=False) + mmpeft.LoRA(at="mlp.*"),
    ],
)
def test_differences_are_written_and_read(method: mmpeft.Method, tmp_path: Path) -> None:
    model = Toy()
    tuning = mmpeft.attach(model, method)
    with torch.no_grad():
        for seed, parameter in enumerate(tuning.parameters()):
            parameter += randn(*parameter.shape, seed=seed)
    export(tuning, tmp_path / "k.safetensors", "kohya", prefix="unet")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MMPEFTWarning)
        load_foreign(other := Toy(), tmp_path / "k.safetensors")
    torch.testing.assert_close(other(X), model(X), atol=1e-6, rtol=1e-5)
    endings = {name.rpartition(".")[2] for name in load_file(tmp_path / "k.safetensors")}
    assert endings & {"diff", "diff_b", "w_norm", "b_norm"}
    with pytest.raises(Refused):
        export(tuning, tmp_path / "d.safetensors", "diffusers", prefix="unet")


def dora() -> tuple[Toy, mmpeft.Tuning]:
    model = Toy()
    tuning = mmpeft.attach(model, mmpeft.DoRA(at="attn.q|mlp.*", rank=2))
    with torch.no_grad():
        for seed, parameter in enumerate(tuning.parameters()):
            parameter += randn(*parameter.shape, seed=seed)
    return model, tuning


@pytest.mark.parametrize("form", ["comfy", "difference", "low_rank"])
def test_dora_in_another_form_is_read_back_as_it_trained(form: Any, tmp_path: Path) -> None:
    model, tuning = dora()
    written = export(tuning, tmp_path / "a.safetensors", "kohya", prefix="unet", dora=form, rank=8)
    load_foreign(other := Toy(), written.path)
    torch.testing.assert_close(other(X), model(X), atol=1e-5, rtol=1e-5)  # rank 8 is all that a width of 8 has
    assert {"comfy": "strength 1", "difference": "full differences", "low_rank": "relative error"}[
        form
    ] in written.notes[0]


def test_comfys_lengths_are_those_that_its_formula_needs(tmp_path: Path) -> None:
    """ComfyUI: `m (W + ΔW) / ‖W‖`."""
    model, tuning = dora()
    tensors = load_file(export(tuning, tmp_path / "a.safetensors", "kohya", prefix="unet", dora="comfy").path)
    base = Toy().blocks[0].q.weight.detach()
    down, up, lengths = (tensors[f"{FLAT}.{n}"] for n in ("lora_down.weight", "lora_up.weight", "dora_scale"))
    tuning.merge()
    theirs = (base + up @ down) * lengths / base.norm(dim=1, keepdim=True)
    torch.testing.assert_close(theirs, model.blocks[0].q.weight.detach(), atol=1e-6, rtol=1e-5)


def test_dora_as_few_ranks_says_its_error(tmp_path: Path) -> None:
    _, tuning = dora()
    notes = export(tuning, tmp_path / "a.safetensors", "diffusers", prefix="unet", dora="low_rank", rank=2).notes
    said = float(notes[0].partition("error of ")[2].partition(" ")[0])
    assert 0.01 < said < 1
    assert (
        "LyCORIS and SD.Next read DoRA" in export(tuning, tmp_path / "k.safetensors", "kohya", prefix="unet").notes[0]
    )
    with pytest.raises(Refused, match="for files that ComfyUI reads"):
        export(tuning, tmp_path / "d.safetensors", "diffusers", prefix="unet", dora="comfy")
    with pytest.raises(ConfigError, match="known: comfy, difference, low_rank"):
        export(tuning, tmp_path / "d.safetensors", "diffusers", prefix="unet", dora="lora")  # type: ignore[arg-type]

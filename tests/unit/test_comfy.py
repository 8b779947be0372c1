"""Flux and SD3 by the names of their original repositories, held against diffusers' own converters."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import AdapterFileError, Refused
from mmpeft.formats import original
from mmpeft.formats.content import Layer
from mmpeft.formats.exchange import convert, inspect, load_foreign
from mmpeft.formats.kohya import kohya_bytes
from mmpeft.formats.low_rank import delta_weights
from tests.matrix.families import FAMILIES
from tests.unit.toy import Toy

CONVERTERS: Any = import_module("diffusers.loaders.single_file_utils")
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def flux() -> nn.Module:
    """The widths of the published model, which diffusers' converter counts on, one block of each kind, no storage."""
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


MODELS = {
    "flux": (flux, CONVERTERS.convert_flux_transformer_checkpoint_to_diffusers),
    "sd3": (lambda: FAMILIES["sd3"]().model, CONVERTERS.convert_sd3_transformer_checkpoint_to_diffusers),
}


class Checkpoint(dict[str, Tensor]):
    """What no layer is about is zero."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(6))


def layers_of_all(model: nn.Module, paths: list[str], shared: bool = False) -> list[Layer]:
    """A random update of each module, on four columns: the names are about rows."""
    generator = torch.Generator().manual_seed(0)
    found: list[Layer] = []
    for path in paths:
        rows = len(model.get_submodule(path).weight)
        down = torch.randn(2, 4, generator=generator)
        down = found[0].down if shared and found else down
        found.append(Layer(path, down, torch.randn(rows, 2, generator=generator), 3.0))
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["own A", "one A"])
@pytest.mark.parametrize("name", MODELS)
def test_diffusers_converts_the_names_back(name: str, shared: bool) -> None:
    build, converter = MODELS[name]
    model = build()
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    table = original.table_of(model)
    assert sorted(path for paths in table.values() for path in paths) == sorted(linears)
    layers = layers_of_all(model, sorted(linears), shared)
    whole = original.fused(layers, model)
    checkpoint = Checkpoint()
    for layer in whole:
        checkpoint[f"{layer.path}.weight"] = delta_weights([layer])[layer.path]
        checkpoint[f"{layer.path}.bias"] = torch.zeros(len(layer.up))
    if name == "sd3":
        checkpoint["joint_blocks.0.x_block.attn.ln_q.weight"] = torch.zeros(1)
    converted = converter(checkpoint)
    wanted = delta_weights(layers)
    for path, delta in wanted.items():
        torch.testing.assert_close(converted[f"{path}.weight"], delta, **CLOSE)
    flat = [replace(layer, path=layer.path.replace(".", "_"), flat=True, component="unet") for layer in whole]
    for back in (original.split(whole, model, "file"), original.split(flat, model, "file")):
        got = delta_weights(back)
        assert set(got) == set(wanted)
        for path, delta in wanted.items():
            torch.testing.assert_close(got[path], delta, **CLOSE)
    ranks = {layer.path: layer.rank for layer in whole if "qkv" in layer.path}
    assert set(ranks.values()) == {2 if shared else 6}


@pytest.mark.parametrize("method", ["LoRA", "part", "DoRA", "part of DoRA"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_file_and_back(family: str, method: str, tmp_path: Path) -> None:
    example = FAMILIES[family]()
    tuning = mmpeft.attach(
        example.model,
        {
            "LoRA": mmpeft.LoRA(at="*attn.*|*mlp.*", rank=2, alpha=3),
            "part": mmpeft.LoRA(at="*attn.q|*attn.v", rank=2),
            "DoRA": mmpeft.DoRA(at="*attn.{q,k,v}|*mlp.*", rank=2),
            "part of DoRA": mmpeft.DoRA(at="attn.q", rank=2),
        }[method],
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    written = tuning.export(tmp_path / "a.safetensors", "comfy")
    assert written.verified_by == ("mmpeft",)
    assert written.difference < 1e-6
    keys = load_file(written.path)
    assert all(key.startswith("diffusion_model.") for key in keys)
    block = {"flux": "double_blocks.0.img_attn", "sd3": "joint_blocks.0.x_block.attn"}[family]
    assert f"diffusion_model.{block}.qkv.lora_A.weight" in keys
    again = FAMILIES[family]()
    load_foreign(again.model, written.path)
    torch.testing.assert_close(again.answer(), example.answer(), atol=1e-5, rtol=1e-5)
    info = inspect(written.path, FAMILIES[family]().model)
    assert (info.format, info.unmatched) == ("comfy", ())
    convert(written.path, tmp_path / "d.safetensors", "diffusers", model=FAMILIES[family]().model)
    convert(tmp_path / "d.safetensors", tmp_path / "b.safetensors", "comfy", model=FAMILIES[family]().model)
    other = FAMILIES[family]()
    load_foreign(other.model, tmp_path / "b.safetensors")
    torch.testing.assert_close(other.answer(), example.answer(), atol=1e-5, rtol=1e-5)


def test_what_has_no_original_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="names of Toy are not known; ComfyUI reads UNets from the kohya"):
        mmpeft.attach(Toy(), mmpeft.LoRA(at="mlp.*")).export(tmp_path / "a.safetensors", "comfy")
    model = FAMILIES["flux"]().model
    with pytest.raises(Refused, match="elsewhere has no one module"):
        original.fused([Layer("elsewhere", torch.ones(1, 2), torch.ones(2, 1))], model)
    halves = {f"diffusion_model.a.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(halves, tmp_path / "b.safetensors")
    with pytest.raises(Refused, match="known for a model only"):
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfy")
    layer = Layer("double_blocks.0.img_attn.qkv", torch.ones(1, 16), torch.ones(9, 1))
    with pytest.raises(AdapterFileError, match=r"has 9 rows, .* together have 48"):
        original.split([layer], model, "file")


@pytest.mark.parametrize("shared", [False, True], ids=["own A", "one A"])
def test_diffusers_reads_kohyas_flux(shared: bool) -> None:
    """At the published width, which its converter counts on."""
    model = flux()
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p.startswith(blocks)]
    made = layers_of_all(model, [path for path in paths if "norm" not in path], shared)
    layers = [replace(layer, alpha=4.0, down=layer.down.clone()) for layer in made]
    data = kohya_bytes(layers, "transformer", {"transformer": model})
    utils: Any = import_module("diffusers.loaders.lora_conversion_utils")
    converted = utils._convert_kohya_flux_lora_to_diffusers(load(data))
    for path, delta in delta_weights(layers).items():
        up, down = (converted[f"transformer.{path}.lora_{half}.weight"] for half in "BA")
        torch.testing.assert_close(up @ down, delta, atol=1e-4, rtol=1e-4)

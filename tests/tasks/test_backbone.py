"""Backbones by name, from files and embedded: what loads, what is refused, and what an interrupted write leaves."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError, MMPEFTError
from mmpeft.vision import backbone
from mmpeft.vision.backbone import create, normalisation, save_embedded

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURE = {**SMALL, "class_token": False, "global_pool": "avg"}
CARD = {
    "architecture": ARCHITECTURE,
    "num_classes": 0,
    "pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3, "input_size": [3, 32, 32]},
    "metrics": {"val": 0.5},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny(**kwargs: Any) -> nn.Module:
    return VisionTransformer(**{**ARCHITECTURE, "num_classes": 0, **kwargs}).eval()


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """A folder of embedded backbones that holds one, `vit_test`, and the model it was written from."""
    monkeypatch.setattr(backbone, "WEIGHTS", tmp_path)
    model = tiny()
    save_embedded(model, "vit_test", tmp_path, CARD)
    return tmp_path, model


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A folder in the layout of timm's `save_for_hf`, and its model with 7 classes."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SMALL).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=SMALL, safe_serialization=True)
    return tmp_path, model


# -- names --------------------------------------------------------------------------------------------------


def test_the_domain_gives_its_names() -> None:  # and imports no library: tests/unit/test_architecture.py
    assert mmpeft.vision.create is create  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'"):
        mmpeft.vision.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_a_timm_name_without_weights() -> None:
    model = create("vit_tiny_patch16_224", 5, pretrained=False, **SMALL)
    assert model(IMAGES).shape == (2, 5)
    assert normalisation(model) == ((32, 32), (0.5,) * 3, (0.5,) * 3)
    assert create("vit_tiny_patch16_224", pretrained=False, **SMALL)(IMAGES).shape == (2, 32)


def test_normalisation_of_a_network_for_any_size() -> None:
    with torch.device("meta"):
        model = create("convnext_atto", 5, pretrained=False)
    assert normalisation(model) == ((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation(nn.Identity()) == ((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_225", "unknown backbone 'vit_base_patch16_225'.*Did you mean 'vit_base_patch16_224"),
        ("vit_base_patch16_224.orig_in21", "no pretrained tag 'orig_in21'.*Did you mean 'orig_in21k'"),
        ("embedded:vit_tset", "no embedded backbone 'vit_tset'.*Did you mean 'vit_test'"),
        ("vit_tset", r"unknown backbone 'vit_tset'.*embedded:<name> \(vit_test\)"),
        ("local-dir:/nowhere/at_all", "cannot tell the architecture of .*at_all"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, message: str, embedded: object) -> None:
    with pytest.raises(ConfigError, match=message):
        create(name)


@pytest.mark.parametrize("count", [-1, 2.0, True, None])
def test_a_wrong_number_of_classes(count: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_classes must be an integer >= 0"):
        create("vit_tiny_patch16_224", count, pretrained=False)


def test_arguments_the_model_lacks(folder: tuple[Path, nn.Module]) -> None:
    for name in ("vit_tiny_patch16_224", str(folder[0])):
        with pytest.raises(ConfigError, match=r"does not take these arguments.*drop_paths"):
            create(name, pretrained=False, drop_paths=0.1)


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(ConfigError, match=r"vit_tiny.*no route to host.*pass pretrained=False.*embedded:"):
        create("vit_tiny_patch16_224.augreg_in21k", **SMALL)


def test_a_model_without_weights_says_so() -> None:
    name = next(n for n in timm.list_models("vit_*") if not timm.list_pretrained(f"{n}.*"))
    with pytest.raises(ConfigError, match=f"{name}: No pretrained weights exist.*pass pretrained=False"):
        create(name, **{**SMALL, "img_size": 64, "patch_size": 16})


def test_the_alias_that_is_not_the_benchmark_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: nn.Identity())
    with caplog.at_level(logging.WARNING):
        create("vit_base_patch16_224.orig_in21k")
        assert not caplog.records
        create("vit_base_patch16_224_in21k")
    assert "augreg_in21k" in caplog.text
    assert "vit_base_patch16_224.orig_in21k" in caplog.text


# -- local folders and files --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["local-dir:{}", "{}", "{}/model.safetensors"])
def test_a_local_folder(folder: tuple[Path, nn.Module], form: str) -> None:
    path, model = folder
    loaded = create(form.format(path), 7).eval()
    assert torch.equal(loaded(IMAGES), model(IMAGES)), "the head is kept when the number of classes agrees"
    other = create(form.format(path), 3).eval()
    assert other(IMAGES).shape == (2, 3)
    assert torch.equal(other.forward_features(IMAGES), model.forward_features(IMAGES))  # type: ignore[operator]
    assert create(form.format(path), 0)(IMAGES).shape == (2, 32)
    random = create(form.format(path), 7, pretrained=False).eval()
    assert not torch.equal(random.head.weight, model.head.weight)  # type: ignore[union-attr, arg-type]


def test_a_bare_file_needs_an_architecture(folder: tuple[Path, nn.Module]) -> None:
    path, model = folder
    os.remove(path / "config.json")
    file = str(path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"cannot tell the architecture.*architecture=<timm name>"):
        create(file)
    loaded = create(file, 7, architecture="vit_tiny_patch16_224", **SMALL).eval()
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    with pytest.raises(ConfigError, match=r"unknown backbone 'vit_tny'"):
        create(file, architecture="vit_tny")


def test_a_file_for_another_image_size_is_resampled(folder: tuple[Path, nn.Module]) -> None:
    path, model = folder
    larger = create(str(path), 7, img_size=64)
    assert normalisation(larger)[0] == (64, 64)
    assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert torch.equal(larger.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)  # type: ignore


def test_missing_extra_and_misshapen_tensors_are_named(folder: tuple[Path, nn.Module]) -> None:
    path, _ = folder
    file = path / "model.safetensors"
    whole = load_file(file)
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in whole.items() if "fc1" not in k}, r"4 tensors missing \(blocks.0.mlp.fc1.bias, .*…\)"),
        ({**whole, "blocks.0.stray": torch.ones(1)}, r"1 tensors unknown \(blocks.0.stray\)"),
        ({**whole, "norm.weight": torch.ones(31)}, r"norm.weight is \(31,\), expected \(32,\)"),
    ]
    for tensors, message in changes:
        save_file(tensors, file)
        with pytest.raises(ConfigError, match=f"does not fit.*{message}"):
            create(str(path), 7)


def test_damaged_files(folder: tuple[Path, nn.Module]) -> None:
    path, _ = folder
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"no whole safetensors file"):
        create(str(path))
    file.unlink()
    with pytest.raises(ConfigError, match=r"no weight file.*pretrained=False"):
        create(str(path))
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no readable JSON card"):
        create(str(path))


# -- embedded -----------------------------------------------------------------------------------------------


def test_embedded_round_trip(embedded: tuple[Path, nn.Module]) -> None:
    path, model = embedded
    loaded = create("embedded:vit_test", 5)
    assert loaded.head.out_features == 5  # type: ignore[union-attr]
    assert normalisation(loaded) == ((32, 32), (0.4, 0.5, 0.6), (0.2,) * 3)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    features = create("embedded:vit_test").eval()
    torch.testing.assert_close(features(IMAGES), model(IMAGES), atol=2e-2, rtol=2e-2)
    assert (path / "vit_test.safetensors").stat().st_size < 2.3 * sum(p.numel() for p in model.parameters()) + 4096
    assert json.loads((path / "vit_test.json").read_text())["metrics"] == {"val": 0.5}
    mmpeft.attach(loaded, mmpeft.LoRA(rank=2))
    by_path = create(str(path / "vit_test.safetensors")).eval()
    assert torch.equal(by_path(IMAGES), features(IMAGES))


def test_embedded_takes_arguments_and_sizes(embedded: tuple[Path, nn.Module]) -> None:
    model = create("embedded:vit_test", 5, img_size=48, drop_path_rate=0.2)
    assert normalisation(model)[0] == (48, 48)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)  # type: ignore
    with pytest.raises(ConfigError, match=r"does not take these arguments.*drop_paths"):
        create("embedded:vit_test", drop_paths=0.2)
    random = create("embedded:vit_test", pretrained=False)
    assert not torch.equal(random.patch_embed.proj.weight, create("embedded:vit_test").patch_embed.proj.weight)  # type: ignore


def test_only_the_backbone_of_a_tuned_model_is_written(tmp_path: Path) -> None:
    model = tiny()
    tuning = mmpeft.attach(model, mmpeft.Full())
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.01)
    tuned = model(IMAGES)
    tuning.merge()
    file = save_embedded(model, "tuned", tmp_path, CARD)
    tensors = load_file(file)
    assert set(tensors) == set(tiny().state_dict())
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    torch.testing.assert_close(create(str(file)).eval()(IMAGES), tuned, atol=2e-2, rtol=2e-2)
    tuning.unmerge()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"describes another model.*blocks.2.attn.proj.bias"):
        save_embedded(tiny(depth=3), "deep", tmp_path, CARD)
    model = tiny()
    for value in (float("nan"), 1e6):
        model.blocks[0].norm1.weight.data[0] = value  # type: ignore
        with pytest.raises(ConfigError, match=r"blocks.0.norm1.weight of odd.safetensors does not fit fp16"):
            save_embedded(model, "odd", tmp_path, CARD)
    assert not list(tmp_path.iterdir())


def test_a_pair_cut_apart_is_noticed(embedded: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = embedded
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith(".json"):
            raise OSError("killed")
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(MMPEFTError, match=r"killed"):
        save_embedded(tiny(), "vit_test", path, CARD)
    monkeypatch.undo()
    monkeypatch.setattr(backbone, "WEIGHTS", path)
    assert sorted(p.name for p in path.iterdir()) == ["vit_test.json", "vit_test.safetensors"]
    with pytest.raises(ConfigError, match=r"SHA-256 differs"):
        create("embedded:vit_test")


def test_a_card_without_architecture(embedded: tuple[Path, nn.Module]) -> None:
    path, _ = embedded
    (path / "vit_test.json").write_text(json.dumps({"num_classes": 0}))
    with pytest.raises(ConfigError, match=r"has no `architecture`"):
        create("embedded:vit_test")
    (path / "vit_test.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"must hold a JSON object"):
        create("embedded:vit_test")

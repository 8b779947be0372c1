"""Drawing with adapters from the shell, and adapters in other tools: the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mmpeft
from mmpeft.cli import main
from mmpeft.diffusion import backbone
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.style.command import Base, base_of, open_adapters
from mmpeft.errors import AdapterFileError
from mmpeft.formats.exchange import load_foreign
from tests.support.moved import attach_moved
from tests.tasks.saved_pipelines import drawn, saved
from tests.tasks.tiny_pipelines import pipeline


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_by_the_exported_file(kind: str, format: str, tmp_path: Path) -> None:
    if (kind, format) == ("sd3", "kohya"):
        pytest.skip("diffusers reads no kohya files for SD3")
    adapter = saved(kind, tmp_path)
    file = tmp_path / "lora.safetensors"
    argv = ["--pipeline", str(tmp_path / kind), "--adapter", str(adapter), "--to", format, "--out", str(file)]
    assert main(["export-pipeline", *argv]) == 0
    ours, theirs = pipeline(kind), backbone.create(str(tmp_path / kind))
    plain = drawn(ours, kind)
    mmpeft.load(family_of(ours).denoiser, adapter)
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = drawn(ours, kind)
    torch.testing.assert_close(drawn(theirs, kind), expected, atol=1e-5, rtol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-3


def texts_of(made: Any) -> dict[str, mmpeft.Tuning]:
    return {name: mmpeft.tunings(part)["default"] for name, part in family_of(made).encoders.items()}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_text_encoders_are_in_the_same_file(kind: str, format: str, tmp_path: Path) -> None:
    """Read by diffusers, and by us: the denoiser and every text encoder."""
    adapter = saved(kind, tmp_path)
    ours = pipeline(kind)
    mmpeft.load(family_of(ours).denoiser, adapter)
    for name, encoder in family_of(ours).encoders.items():
        attach_moved(encoder, mmpeft.LoRA(rank=2, at="attn.{q,k,v,out}", alpha=1), by=0.3).save(adapter / name)
    file = tmp_path / "lora.safetensors"
    argv = ["--pipeline", str(tmp_path / kind), "--adapter", str(adapter), "--to", format, "--out", str(file)]
    assert main(["export-pipeline", *argv]) == 0
    theirs, again = backbone.create(str(tmp_path / kind)), family_of(pipeline(kind))
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = drawn(ours, kind)
    torch.testing.assert_close(drawn(theirs, kind), expected, atol=1e-5, rtol=1e-5)
    count = len(again.encoders)
    alone = texts_of(ours)["text_encoder"].export(tmp_path / "te.safetensors", format, encoders=count)
    kohya = {1: "lora_te_", 2: "lora_te1_"}[count] + "text_model_encoder_"
    start = kohya if format == "kohya" else "text_encoder.text_model.encoder."
    assert all(name.startswith(start) for name in load_file(alone.path))
    assert any(name.startswith(start) for name in load_file(file))
    ((_, *texts),) = open_adapters(again, [file])
    assert len(texts) == len(again.encoders)
    torch.testing.assert_close(drawn(again.pipeline, kind), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["pixart", "pixel-dit"])
def test_what_peers_cannot_reload_loads_here(kind: str, tmp_path: Path) -> None:
    adapter = saved(kind, tmp_path)
    file = tmp_path / "lora.safetensors"
    tuned = pipeline(kind)
    tuning = mmpeft.load(family_of(tuned).denoiser, adapter)
    tuning.export(file, "diffusers", verify=False)
    other = pipeline(kind)
    load_foreign(family_of(other).denoiser, file)
    torch.testing.assert_close(drawn(other, kind), drawn(tuned, kind), atol=1e-5, rtol=1e-5)


def test_a_merged_pipeline_is_one_of_diffusers(tmp_path: Path) -> None:
    adapter = saved("sd", tmp_path)
    argv = ["--pipeline", str(tmp_path / "sd"), "--adapter", str(adapter), "--to", "pipeline"]
    assert main(["export-pipeline", *argv, "--out", str(tmp_path / "merged")]) == 0
    tuned = pipeline("sd")
    mmpeft.load(tuned.unet, adapter)
    torch.testing.assert_close(
        drawn(backbone.create(str(tmp_path / "merged")), "sd"), drawn(tuned, "sd"), atol=1e-5, rtol=1e-4
    )


def picture(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255


def test_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = saved("pixel-unet", tmp_path), saved("pixel-unet", tmp_path, seed=1)
    houlsby = saved("pixel-unet", tmp_path, mmpeft.Houlsby(bottleneck=4), seed=2)

    def sample(*argv: str) -> torch.Tensor:
        base = ["--pipeline", str(tmp_path / "pixel-unet"), "--steps", "2", "--out", str(tmp_path / "out.png")]
        assert main(["sample", "--prompt", "a cat", *base, *argv]) == 0
        return picture(tmp_path / "out.png")

    plain, one = sample(), sample("--adapter", str(first))
    assert torch.equal(sample("--adapter", str(first), "--strength", "0"), plain)
    assert torch.equal(sample("--adapter", str(first), "--weights", "1"), one)
    half = sample("--adapter", str(first), "--strength", "0.5")
    assert 0 < float((half - plain).abs().mean()) < float((one - plain).abs().mean())
    both = sample("--adapter", str(first), str(second), "--weights", "0.7", "0.5")
    assert float((both - one).abs().max()) > 0
    assert torch.equal(sample("--adapter", str(first), str(second), "--weights", "1", "0"), one)
    assert float((sample("--adapter", str(houlsby), "--strength", "0.5") - plain).abs().max()) > 0
    assert sample("--adapter", str(first), "--compare", "--count", "2").numel() > plain.numel()
    assert "picture:" in capsys.readouterr().out


def test_an_adapter_of_a_run_is_drawn_on_the_base_as_the_run_held_it(tmp_path: Path) -> None:
    adapter = saved("sd", tmp_path)
    model = {"init_args": {"pipeline": str(tmp_path / "sd"), "dtype": "bfloat16", "resolution": 24}}
    (adapter.parent / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {"init_args": {}}}))
    assert base_of(None, [adapter]) == Base(str(tmp_path / "sd"), "bfloat16", None, 24)
    assert base_of("other", [adapter]) == Base("other")
    argv = ["sample", "--prompt", "a cat", "--adapter", str(adapter), "--steps", "2", "--out"]
    assert main([*argv, str(tmp_path / "half.png")]) == 0
    assert main([*argv, str(tmp_path / "whole.png"), "--dtype", "float32"]) == 0
    half, whole = picture(tmp_path / "half.png"), picture(tmp_path / "whole.png")
    assert half.shape == whole.shape
    assert 0 < float((half - whole).abs().mean()) < 0.1


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved("pixel-unet", tmp_path)
    pipeline("sd").save_pretrained(tmp_path / "sd")
    base = ["sample", "--prompt", "a cat", "--adapter", str(adapter)]
    for argv, said in {
        ("--pipeline", str(tmp_path / "sd")): "expected",
        ("--pipeline", str(tmp_path / "pixel-unet"), "--weights", "1", "2"): "one for each of 1 adapters, got 2",
        ("--pipeline", str(tmp_path / "pixel-unet"), "--size", "64"): "draws 16 pixels, asked for 64",
        (): "--pipeline is needed",
    }.items():
        assert main([*base, *argv, "--out", str(tmp_path / "x.png")]) == 2
        assert said in capsys.readouterr().err
    sd = ["sample", "--prompt", "a cat", "--pipeline", str(tmp_path / "sd"), "--out", str(tmp_path / "x.png")]
    assert main([*sd, "--size", "13"]) == 2
    assert "--size is a multiple of 4 for this pipeline, got 13" in capsys.readouterr().err
    for option in ("--steps", "--count", "--size"):
        with pytest.raises(SystemExit):
            main([*sd, option, "0"])
        assert "expected a whole number of 1 or more, got '0'" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(AdapterFileError):
        load_foreign(pipeline("pixel-dit").transformer, adapter)

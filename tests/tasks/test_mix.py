"""Several LoRAs in one file: weighted sums, and ZipLoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mmpeft
from mmpeft.cli import main
from mmpeft.combine.zip import penalty
from mmpeft.diffusion import backbone
from mmpeft.diffusion.families import family_of
from mmpeft.errors import ConfigError, Refused
from mmpeft.formats.exchange import mix_files
from tests.matrix.families import FAMILIES
from tests.support.moved import attach_moved
from tests.tasks.saved_pipelines import LORA, drawn, saved
from tests.tasks.tiny_pipelines import pipeline

OTHER = mmpeft.LoRA(rank=3, at="attn.{q,v}|mlp.*")
LOHA = mmpeft.LoHa(rank=3, at="attn.{q,v}|mlp.*")  # too high a rank here for the form that is never multiplied out


def test_untrained_it_is_the_weighted_sum_and_every_column_has_its_own_weight() -> None:
    example = FAMILIES["sd_unet"]()
    at = mmpeft.LoRA(rank=2, at="attn.q|conv", alpha=4)
    tunings = [
        attach_moved(example.model, method, name, 0.3, i)
        for i, (name, method) in enumerate({"a": at, "b": OTHER}.items())
    ]
    with mmpeft.use(example.model, mmpeft.Together(("a", "b"), (1.0, 0.5))):
        wanted = example.answer()
    zipped = mmpeft.zip_lora(tunings, [1.0, 0.5])
    torch.testing.assert_close(example.answer(), wanted, atol=1e-5, rtol=1e-5)
    both = [p for p in zipped.placements if len(p.part.factor.weights) == 2]
    assert 0 < len(both) < len(zipped.placements)
    factor = both[0].part.factor
    torch.nn.init.normal_(factor.weights[0])
    own = [next(p.part for p in tuning.placements if p.home == both[0].home) for tuning in tunings]
    wanted = sum(part.factor.materialise() * part.scale * weight for part, weight in zip(own, factor.weights))
    torch.testing.assert_close(factor.materialise(), wanted)
    overlaps = [0.5] * (len(both) - 1) + [float((factor.weights[0] * factor.weights[1]).abs().mean())]
    torch.testing.assert_close(penalty(zipped), torch.tensor(sum(overlaps) / len(zipped.placements)))


def test_what_is_no_low_rank_update_is_refused() -> None:
    example = FAMILIES["vit"]()
    tunings = [
        attach_moved(example.model, method, name, 0.3) for name, method in (("a", mmpeft.LoRA()), ("b", mmpeft.DoRA()))
    ]
    with pytest.raises(Refused, match="Run them as a weighted sum"):
        mmpeft.zip_lora(tunings)
    with pytest.raises(ConfigError, match="got 1 of 1"):
        mmpeft.zip_lora(tunings[:1])


@pytest.mark.parametrize("other", [OTHER, LOHA], ids=["LoRA", "LoHa"])
def test_a_sum_in_one_file_draws_as_diffusers_draws_both(tmp_path: Path, other: mmpeft.LoRA) -> None:
    adapters = [str(saved("sd", tmp_path, method, seed)) for seed, method in enumerate((LORA, other))]
    file = tmp_path / "both.safetensors"
    argv = ["--pipeline", str(tmp_path / "sd"), "--adapter", *adapters, "--weights", "0.7", "0.4", "--out", str(file)]
    assert main(["mix", *argv]) == 0
    theirs: Any = backbone.create(str(tmp_path / "sd"))
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    ours = pipeline("sd")
    model = family_of(ours).denoiser
    for number, adapter in enumerate(adapters):
        mmpeft.load(model, adapter, f"n{number}")
    with mmpeft.use(model, mmpeft.Together(("n0", "n1"), (0.7, 0.4))):
        wanted = drawn(ours, "sd")
    torch.testing.assert_close(drawn(theirs, "sd"), wanted, atol=1e-5, rtol=1e-5)


def test_zip_comes_nearer_to_what_each_adapter_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = [str(saved("pixel-unet", tmp_path, LORA, seed)) for seed in (0, 1)]
    file = tmp_path / "zip.safetensors"
    argv = ["--pipeline", str(tmp_path / "pixel-unet"), "--adapter", *adapters, "--prompt", "a cat", "red apple"]
    argv += ["--steps", "12", "--lr", "0.1", "--images", "2"]
    texts = []
    for _ in range(2):
        assert main(["mix", *argv, "--out", str(file)]) == 0
        texts.append((capsys.readouterr().out, file.read_bytes()))
    first, last = map(float, re.findall(r"\d\.\d+e[-+]\d+", texts[0][0]))
    assert last < 0.9 * first
    assert texts[0] == texts[1]
    other = pipeline("pixel-unet")
    tuning = mmpeft.load_foreign(other.unet, file)
    assert all(len(p.part.factor.A) == 4 for p in tuning.placements)


def test_a_sum_of_files_needs_no_pipeline(tmp_path: Path) -> None:
    example, files = FAMILIES["sd_unet"](), []
    for number, method in enumerate((LORA, OTHER)):
        files.append(str(tmp_path / f"{number}.safetensors"))
        attach_moved(example.model, method, f"n{number}", 0.3, number).export(files[-1], format="diffusers")
    mixed = tmp_path / "both.safetensors"
    assert main(["mix", "--adapter", *files, "--weights", "0.7", "0.4", "--out", str(mixed)]) == 0
    with mmpeft.use(example.model, mmpeft.Together(("n0", "n1"), (0.7, 0.4))):
        wanted = example.answer()
    mmpeft.load_foreign(example.model, mixed, "mixed")
    torch.testing.assert_close(example.answer(), wanted, atol=1e-5, rtol=1e-5)


def test_a_sum_of_files_that_need_a_model_asks_for_the_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kohya.safetensors"
    attach_moved(FAMILIES["sd_unet"]().model, LORA, "a", 0.3).export(file, format="kohya")
    assert main(["mix", "--adapter", str(file), str(file), "--out", str(tmp_path / "x")]) == 2
    assert "--pipeline is needed" in capsys.readouterr().err
    dora = tmp_path / "dora.safetensors"
    attach_moved(FAMILIES["sd_unet"]().model, mmpeft.DoRA(rank=2), "a", 0.3).export(dora, format="diffusers")
    (tmp_path / "both.safetensors").write_bytes(dora.read_bytes())
    with pytest.raises(Refused, match="DoRA magnitudes"):
        mix_files([dora, tmp_path / "both.safetensors"], file)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(saved("pixel-unet", tmp_path))
    for more, why in (
        (["--adapter", adapter], "two adapters and a weight each"),
        (["--adapter", adapter, adapter, "--weights", "1"], "got 2 and 1"),
        (["--adapter", adapter, adapter, "--prompt", "a cat"], "a prompt for each of 2"),
    ):
        assert main(["mix", *more, "--out", str(tmp_path / "x")]) == 2
        assert why in capsys.readouterr().err

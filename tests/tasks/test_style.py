"""Tuning pipelines to a style: every family trains, is resumed to the bit, and draws the same grid again."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

import mmpeft
from mmpeft.diffusion.data.images import CaptionedImages
from mmpeft.diffusion.style.grid import Show
from mmpeft.diffusion.style.slider import SliderTuner
from mmpeft.diffusion.style.task import StyleTuner
from mmpeft.errors import ConfigError, DataError
from mmpeft.run.callbacks import Outcome
from tests.support.killing import KillBefore, assert_same_bits, killed, last
from tests.tasks.style_runs import LORA, pictures, trainer
from tests.tasks.tiny_pipelines import PIPELINES, pipeline

SHOW = Show(prompts=("a cat",), every=3, steps=2, strengths=(0.0, 1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every pipeline as a folder, and pictures."""
    root = tmp_path_factory.mktemp("style")
    for kind in PIPELINES:
        pipeline(kind).save_pretrained(root / kind)
    pictures(root / "pictures")
    return {path.name: path for path in root.iterdir()}


def task(folder: Path, **options: Any) -> StyleTuner:
    torch.manual_seed(0)
    options = {"method": LORA, "optimizer": partial(torch.optim.AdamW, lr=1e-2), "warmup": 0.0, **options}
    return StyleTuner(str(folder), **options)


def data(folders: dict[str, Path], **options: Any) -> CaptionedImages:
    return CaptionedImages(str(folders["pictures"]), **{"batch_size": 2, "resolution": 16, **options})


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_family_trains_what_the_method_says_and_nothing_else(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    module = task(folders[kind], cache_dir=str(tmp_path / "cache"))
    before = {n: t.clone() for n, t in pipeline(kind).components[_part(kind)].state_dict().items()}
    trainer(tmp_path, 4).fit(module, data(folders))
    assert all(float(p.detach().abs().sum()) > 0 for n, p in module.named_parameters() if n.endswith(".B"))
    module.tuning.detach()
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    latents = 0 if kind.startswith("pixel") else 6
    assert len(list((tmp_path / "cache").iterdir())) == latents + 7  # six captions and the empty one


def _part(kind: str) -> str:
    return "unet" if kind in ("pixel-unet", "sd", "sdxl") else "transformer"


def run(
    folder: Path,
    kind: str,
    folders: dict[str, Path],
    kill: int | None = None,
    resume: bool = False,
    every: int | None = 1,
) -> None:
    """Two epochs of three steps, with everything that draws random numbers."""
    lightning.seed_everything(2 if resume else 1, verbose=False)
    module = task(folders[kind], show=SHOW, no_caption=0.3, method=mmpeft.LoRA(rank=2, dropout=0.1))
    callbacks = [KillBefore(kill)] if kill is not None else []
    trainer(folder, 6, *callbacks, every=every).fit(module, data(folders), ckpt_path="last" if resume else None)


@pytest.mark.parametrize(("kind", "every"), [("pixel-unet", 1), ("sd", 1), ("sd", None)])
def test_a_resumed_run_has_the_same_bits_and_the_same_next_grid(
    kind: str, every: int | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(whole, kind, folders, every=every)
    killed(run, part, kind, folders, 4, False, every)
    run(part, kind, folders, resume=True, every=every)
    states = [last(folder)["state_dict"] for folder in (whole, part)]
    assert_same_bits(*states)
    grids = [(f / "grids" / "000006.png").read_bytes() for f in (whole, part)]
    assert grids[0] == grids[1]
    assert (whole / "grids" / "000003.png").is_file()


def test_text_encoders_train_beside_the_denoiser(folders: dict[str, Path], tmp_path: Path) -> None:
    module = task(folders["sdxl"], text_method=mmpeft.LoRA(rank=2))
    trainer(tmp_path, 2, Outcome()).fit(module, data(folders))
    trained = {n for n, p in module.named_parameters() if p.requires_grad and n.startswith("texts.")}
    assert {n.split(".")[1] for n in trained} == {"text_encoder", "text_encoder_2"}
    for name in ("", "text_encoder", "text_encoder_2"):
        assert (tmp_path / "adapter" / name / "adapter.json").is_file()
    assert trained <= set(last(tmp_path)["state_dict"])


def test_the_teacher_holds_what_another_prompt_draws(folders: dict[str, Path], tmp_path: Path) -> None:
    drifts = {}
    for weight in (0.0, 100.0):
        module = task(folders["sd"], prior_weight=weight, prior_prompt="a fish")
        trainer(tmp_path / str(weight), 12).fit(module, data(folders))
        batch = next(iter(data_of(module)))
        with torch.no_grad():
            drifts[weight] = float(module._drift(batch, torch.Generator().manual_seed(0)))
    assert 0 < drifts[100.0] < 0.5 * drifts[0.0]


def test_prior_images_are_learned_beside_those_of_the_subject(folders: dict[str, Path], tmp_path: Path) -> None:
    prior = pictures(tmp_path / "class", count=3, prompt="a fish")
    errors = {}
    for weight in (0.0, 30.0):
        module = task(folders["sd"], prior_weight=weight)
        images = data(folders, prior_root=str(prior), prior_prompt="a fish")
        trainer(tmp_path / str(weight), 12).fit(module, images)
        batch = next(iter(data_of(module)))
        with torch.no_grad():
            errors[weight] = float(module._error(batch["prior"], torch.Generator().manual_seed(0)))
        assert ("train/prior" in module.trainer.callback_metrics) == bool(weight)
    assert errors[30.0] < errors[0.0]


def data_of(module: StyleTuner) -> Any:
    return module.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]


def test_at_strength_zero_the_base_draws(folders: dict[str, Path], tmp_path: Path) -> None:
    module = task(folders["pixel-unet"])
    trainer(tmp_path, 3).fit(module, data(folders))
    made = pipeline("pixel-unet")
    generator = [torch.Generator().manual_seed(5)]
    base = module.family.draw(["a cat"], [torch.Generator().manual_seed(5)], 2, 3.0, 16)
    expected = made("a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt").images
    assert not torch.allclose(base, expected)
    with module._base():
        base = module.family.draw(["a cat"], [torch.Generator().manual_seed(5)], 2, 3.0, 16)
    assert torch.equal(base, expected)
    assert torch.equal(module.draw(["a cat"], 0.0), module.draw(["a cat"], 0.0))
    half, whole = module.draw(["a cat"], 0.5), module.draw(["a cat"], 1.0)
    zero = module.draw(["a cat"], 0.0)
    assert 0 < float((half - zero).abs().max()) < float((whole - zero).abs().max())


def test_a_slider_moves_the_concept_towards_more(folders: dict[str, Path], tmp_path: Path) -> None:
    words = {"concept": "a face", "more": "smiling face", "less": "red apple", "keep": ("", "cat")}
    module = SliderTuner(
        str(folders["pixel-unet"]), **words, method=LORA, optimizer=partial(torch.optim.AdamW, lr=1e-2)
    )
    trainer(tmp_path, 30).fit(module, data(folders))
    batch = next(iter(data_of(module)))
    generator = torch.Generator().manual_seed(0)
    noise, steps = module._draw(batch["image"], generator)

    def predicted(prompt: str) -> torch.Tensor:
        return module._predict(batch["image"], noise, steps, module.condition([prompt] * 2))

    with torch.no_grad(), module._base():
        start = predicted("a face")
        way = predicted("smiling face") - predicted("red apple")
    with torch.no_grad():
        moved = predicted("a face") - start
        with mmpeft.strength(module.tuning, -1.0):
            back = predicted("a face") - start
    assert float(torch.nn.functional.cosine_similarity(moved.flatten(), way.flatten(), dim=0)) > 0.5
    assert float(torch.nn.functional.cosine_similarity(back.flatten(), way.flatten(), dim=0)) < -0.5
    with pytest.raises(ConfigError, match="concept, more and less"):
        SliderTuner(str(folders["sd"]), concept="a face", more="a", less="a", method=LORA)


@pytest.mark.parametrize("method", [LORA, mmpeft.DoRA(rank=2, at="attn.*"), mmpeft.ParallelAdapter(bottleneck=4)])
def test_a_base_in_eight_bits(method: mmpeft.Method, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    bits = {"quant_backend": "torchao", "components_to_quantize": ["unet"]}
    eight = {**bits, "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}
    module = task(folders["sd"], method=method, quantization=eight)
    trainer(tmp_path, 2, Outcome()).fit(module, data(folders))
    weight = module.family.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight
    assert type(weight).__name__ == "Int8Tensor"
    assert all(p.dtype == torch.float32 for p in module.tuning.parameters())
    tuned, plain = module.draw(["a cat"]), module.draw(["a cat"], 0.0)
    assert float((tuned - plain).abs().max()) > 1e-3
    again = task(folders["sd"], method=method, quantization=eight)
    model = again.build()
    mmpeft.load(model, tmp_path / "adapter")
    module.family.pipeline.unet = model
    torch.testing.assert_close(module.draw(["a cat"]), tuned)
    with pytest.raises(ConfigError, match="torchao has no 'int9'"):
        task(folders["sd"], quantization={**bits, "quant_kwargs": {"quant_type": "int9"}}).build()


def test_bad_input(folders: dict[str, Path], tmp_path: Path) -> None:
    long = pictures(tmp_path / "long", prompt="red apple " * 40)
    with pytest.raises(DataError, match=r"6 prompts are longer than the 32 tokens .*long/0.png \(165\).* and 3 more"):
        trainer(tmp_path, 1).fit(task(folders["sd"]), CaptionedImages(str(long), resolution=16))
    ours = {"resolution": 16, "batch_size": 2}
    small = pictures(tmp_path / "small", side=8)
    with pytest.raises(DataError, match="8"):
        trainer(tmp_path, 1).fit(task(folders["sd"]), CaptionedImages(str(small), **ours))
    with pytest.raises(ConfigError, match="prior_prompt"):
        trainer(tmp_path, 1).fit(task(folders["sd"], prior_weight=1.0), data(folders))
    with pytest.raises(ConfigError, match="the model's resolution is 32 and the data's is 16; set one"):
        trainer(tmp_path, 1).fit(task(folders["sd"], resolution=32), data(folders))
    with pytest.raises(ConfigError, match="draws 16 pixels, asked for 32"):
        trainer(tmp_path, 1).fit(task(folders["pixel-unet"]), data(folders, resolution=32))
    with pytest.raises(DataError, match="no test samples"):
        trainer(tmp_path, 1).test(task(folders["sd"]), data(folders))
    with pytest.raises(ConfigError, match="set `timestep_sampling` instead"):
        trainer(tmp_path, 1).fit(task(folders["sd3"], snr_gamma=5.0), data(folders))
    for options in ({"no_caption": 1.0}, {"prior_weight": -1.0}, {"dtype": "int8"}):
        with pytest.raises(ConfigError):
            task(folders["sd"], **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_without_a_scaled_loss_is_said(dtype: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    module = task(folders["pixel-unet"], dtype=dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, 1).fit(module, data(folders))
    assert any("nothing scales the loss" in str(one.message) for one in said) == (dtype == "float16")

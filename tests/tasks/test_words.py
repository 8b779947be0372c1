"""Textual inversion: new words train alone, and their files say the same in diffusers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft.diffusion.backbone import create
from mmpeft.diffusion.data.images import CaptionedImages
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.style.command import open_adapters
from mmpeft.diffusion.style.words import WordTuner, add_words, load_words
from mmpeft.errors import AdapterFileError, ConfigError, DataError
from mmpeft.run.callbacks import Outcome
from tests.tasks.style_runs import LORA, pictures, trainer
from tests.tasks.tiny_pipelines import pipeline

WORDS = {"<round>": "red apple", "<flat>": "cat"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("words")
    for kind in ("sd", "sdxl", "sd3", "pixel-unet"):
        pipeline(kind).save_pretrained(root / kind)
    pictures(root / "pictures", prompt="a <round> <flat> face")
    return {path.name: path for path in root.iterdir()}


def tuned(kind: str, folders: dict[str, Path], folder: Path, **options: Any) -> WordTuner:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=1e-1)
    module = WordTuner(str(folders[kind]), words=WORDS, optimizer=optimizer, warmup=0.0, **options)
    trainer(folder, 2, Outcome()).fit(
        module, CaptionedImages(str(folders["pictures"]), prompt=None, batch_size=2, resolution=16)
    )
    return module


def table(encoder: Any) -> torch.Tensor:
    return encoder.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixel-unet"])
def test_only_the_new_rows_train_and_they_start_as_their_description(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = create(str(folders[kind]))
    module = tuned(kind, folders, tmp_path)
    for name, encoder in module.family.encoders.items():
        start, now = table(getattr(before, name)), table(encoder)
        assert torch.equal(now[: len(start)], start)
        ids = before.tokenizer("red apple", add_special_tokens=False)["input_ids"]
        with mmpeft.use(encoder, None):
            base = table(encoder).clone()
        torch.testing.assert_close(base[-2], start[ids].mean(0))
        assert ((now[-2:] - base[-2:]).abs().amax(1) > 1e-2).all()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == 2 * sum(table(encoder).shape[1] for encoder in module.family.encoders.values())


def image(pipe: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe("a <round> face", num_inference_steps=2, generator=noise, output_type="np", height=16, width=16).images
    )


@pytest.mark.parametrize(("kind", "vectors"), [("sd", 3), ("sdxl", 1)])
def test_diffusers_draws_the_same_with_the_files(
    kind: str, vectors: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    tuned(kind, folders, tmp_path, vectors=vectors)
    files = tmp_path / "adapter" / "words"
    open_adapters(family_of(create(str(folders[kind]))), [tmp_path / "adapter"])
    assert sorted(path.name for path in files.iterdir()) == ["flat.safetensors", "round.safetensors"]
    family = family_of(create(str(folders[kind])))
    assert load_words(family, files) == ["<flat>", "<round>"]
    ours = image(family.pipeline)
    if kind == "sd":
        pipe: Any = StableDiffusionPipeline.from_pretrained(folders[kind])
        for word in WORDS:
            pipe.load_textual_inversion(str(files / f"{word[1:-1]}.safetensors"))
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(folders[kind])
        for word in WORDS:
            tensors = load_file(files / f"{word[1:-1]}.safetensors")
            for key, end in (("clip_l", ""), ("clip_g", "_2")):
                own = {
                    "text_encoder": getattr(pipe, f"text_encoder{end}"),
                    "tokenizer": getattr(pipe, f"tokenizer{end}"),
                }
                pipe.load_textual_inversion(tensors[key], token=word, **own)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(image(pipe), ours, atol=1e-5, rtol=1e-5)
    other = family_of(create(str(folders[kind])))
    add_words(other, {"<round>": "cat"})
    assert (image(other.pipeline) - ours).abs().max() > 1e-4


def test_beside_methods_on_both_models(folders: dict[str, Path], tmp_path: Path) -> None:
    """Custom diffusion: cross-attention's keys and values, the words, and here LoRA in the text encoder as well."""
    module = tuned(
        "sd", folders, tmp_path, method=mmpeft.Full(at="cross.{k,v}"), text_method=mmpeft.LoRA(rank=2, at="attn.q")
    )
    family = family_of(create(str(folders["sd"])))
    ((_, text),) = open_adapters(family, [tmp_path / "adapter"])
    wanted = module.draw(["a <round> face"], seeds=[0])
    module.family.pipeline.unet, module.family.pipeline.text_encoder = family.denoiser, text.model
    torch.testing.assert_close(module.draw(["a <round> face"], seeds=[0]), wanted)


def test_a_pipeline_over_pixels_reads_words_of_several_vectors(folders: dict[str, Path]) -> None:
    family = family_of(create(str(folders["pixel-unet"])))
    width = table(family.pipeline.text_encoder).shape[1]
    add_words(family, {"<a>": {"text_encoder": torch.randn(3, width)}})
    with_word, without = family.encode_prompt(["<a> cat", "cat"])["mask"].sum(1)
    assert with_word >= without + 3
    with pytest.raises(DataError, match="longer than"):
        family.check_prompts(["<a> " * (int(family.contexts[0][1]) // 3)])
    noise = [torch.Generator().manual_seed(0)]
    plain, away = (family.draw(["a cat"], noise, 2, 3.0, family.size, negative) for negative in ("", "<a>"))
    assert (plain - away).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="negative prompt needs guidance"):
        family.draw(["a cat"], noise, 2, 1.0, family.size, "<a>")


def test_bad_input(folders: dict[str, Path], tmp_path: Path) -> None:
    for words in ({}, {"two words": "cat"}, {"<a>": " "}):
        with pytest.raises(ConfigError, match="new words without spaces"):
            WordTuner(str(folders["sd"]), words=words, method=LORA)
    with pytest.raises(ConfigError, match="not for StableDiffusion3Pipeline"):
        WordTuner(str(folders["sd3"]), words=WORDS).build()
    family = family_of(create(str(folders["sd"])))
    add_words(family, {"<a>": "cat"})
    with pytest.raises(ConfigError, match="knows '<a>' already"):
        add_words(family, {"<a>": "cat"})
    tuned("sd", folders, tmp_path)
    files = tmp_path / "adapter" / "words"
    with pytest.raises(AdapterFileError, match=r"vectors .* for each of text_encoder, text_encoder_2"):
        load_words(family_of(create(str(folders["sdxl"]))), files)
    with pytest.raises(AdapterFileError, match="for another pipeline"):
        load_words(family_of(create(str(folders["pixel-unet"]))), files)
    with pytest.raises(AdapterFileError, match="holds no"):
        load_words(family, tmp_path)


def features(family: Any, prompt: str) -> torch.Tensor:
    return family.encode_prompt([prompt])["text"]


@pytest.mark.parametrize("word", ["<MyStyle>", "mystyle", "style-2"])
def test_every_vector_of_a_word_is_used_in_either_case(word: str, folders: dict[str, Path]) -> None:
    family = family_of(create(str(folders["sd"])))
    add_words(family, {word: "cat"}, vectors=3)
    encoder = family.pipeline.text_encoder
    rows = encoder.get_input_embeddings().weight.requires_grad_()
    for prompt in (f"a {word} face", f"{word.upper()}, a face"):
        (grad,) = torch.autograd.grad(features(family, prompt).square().sum(), rows)
        assert (grad[-3:].abs().amax(1) > 0).all()


def test_words_are_whole_words_and_the_longest_wins(folders: dict[str, Path]) -> None:
    family = family_of(create(str(folders["sd"])))
    plain = features(family, "sunlit styles")
    width = table(family.pipeline.text_encoder).shape[1]
    rows = {word: torch.randn(n, width) for word, n in (("style", 2), ("style2", 3), ("sun", 1))}
    add_words(family, {word: {"text_encoder": own} for word, own in rows.items()})
    torch.testing.assert_close(features(family, "sunlit styles"), plain)
    ids = family.pipeline.tokenizer(family.pipeline.maybe_convert_prompt("style2 style sun", None))["input_ids"]
    first = len(table(family.pipeline.text_encoder)) - 6
    assert [i - first for i in ids if i >= first] == [2, 3, 4, 0, 1, 5]
    add_words(family, {"moon": {"text_encoder": rows["style2"]}})  # words that came before stay
    ids = family.pipeline.tokenizer(family.pipeline.maybe_convert_prompt("Moon style", None))["input_ids"]
    assert [i - first for i in ids if i >= first] == [6, 7, 8, 0, 1]


def test_a_word_without_a_name_is_called_as_its_file(folders: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(create(str(folders["sd"])))
    width = table(family.pipeline.text_encoder).shape[1]
    save_file({"emb_params": torch.randn(2, width)}, tmp_path / "my-face.safetensors")
    plain = features(family, "a my-face")
    assert load_words(family, tmp_path / "my-face.safetensors") == ["my-face"]
    assert (features(family, "a my-face") - plain).abs().max() > 1e-3
    torch.save({"string_to_param": {"*": torch.randn(2, width)}}, tmp_path / "old.pt")
    with pytest.raises(AdapterFileError, match="pickled"):
        load_words(family, tmp_path / "old.pt")

"""The evaluators know real drawings, and a test run judges base, tuned and real drawings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

import mmpeft
from mmpeft.diffusion.data import CaptionedImages
from mmpeft.diffusion.data.emoji import EmojiStyle
from mmpeft.diffusion.style.emoji_judge import EmojiJudge
from mmpeft.diffusion.style.grid import Show
from mmpeft.diffusion.style.pair_judge import PairJudge
from mmpeft.diffusion.style.task import StyleTuner
from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError
from mmpeft.run.callbacks import rows_before
from tests.tasks.small_judge import small_judge
from tests.tasks.tiny import trainer
from tests.tasks.tiny_pipelines import PAIR, clip, image_text_pair, sized, tokenizer


def test_real_drawings_are_told_apart() -> None:
    judge = small_judge("openmoji")
    real, other = (emoji(style, "test", 32) for style in ("openmoji", "noto"))
    images, others = (drawn.rgb()[::4].float() / 255 for drawn in (real, other))
    own = judge.accuracy(images, [], real.labels[::4])
    assert own["style"] > 0.8
    assert own["caption"] > 0.45  # nine categories
    assert judge.accuracy(others, [], real.labels[::4])["style"] < 0.2
    mean, spread_ = judge.kid(images[::2], images[1::2])
    assert abs(mean) < 2 * spread_  # two halves of one style: the estimate is unbiased
    assert judge.kid(others, images)[0] > 0.2
    assert judge.kid(others, images) == judge.kid(others, images)


def test_a_test_run_judges_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def small(*given: Any) -> EmojiJudge:
        asked.append(given)
        return small_judge("openmoji")

    monkeypatch.setattr("mmpeft.diffusion.data.emoji.EmojiJudge", small)
    sized(32).save_pretrained(tmp_path / "unet")
    method = mmpeft.LoRA(rank=2, at="attn.*")
    module = StyleTuner(
        str(tmp_path / "unet"),
        method,
        show=Show(every=2, steps=2, num_validation_images=8),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    data = EmojiStyle(images=40, template="{}, outlined", test_images=18, batch_size=4)
    fit = trainer(tmp_path, max_steps=2, limit_val_batches=0, logger=CSVLogger(tmp_path, name="", version=""))
    fit.fit(module, data)
    (found,) = fit.test(module, data, verbose=False)
    for kind in ("base", "test", "plain", "plain_base"):
        assert 0 <= found[f"{kind}/style"] <= 1
        assert found[f"{kind}/kid"] > found[f"{kind}/kid_spread"]  # noise is far from any drawing
    assert found["real/style"] > 0.7
    assert found["plain_real/style"] < 0.3
    assert found["base/kid"] != found["test/kid"]
    assert (tmp_path / "test.png").is_file()
    assert asked
    assert all(given == (32, "openmoji", emoji("openmoji", "train").identity[data.rows].tolist()) for given in asked)
    (row,) = rows_before(tmp_path / "scores.csv", 2)
    assert {"val/style", "val/caption", "plain/style", "plain_base/caption", "real/style"} <= row.keys()


def test_ones_own_images_are_judged_by_an_image_text_pair(tmp_path: Path) -> None:
    sized(32).save_pretrained(tmp_path / "unet")
    pair = image_text_pair(tmp_path / "pair")
    for split, count in (("train", 4), ("val", 5), ("test", 6)):
        drawn = emoji("openmoji", split, 64)
        (tmp_path / split).mkdir()
        for row in range(count):
            Image.fromarray(drawn.rgb()[row].permute(1, 2, 0).numpy()).save(tmp_path / split / f"{row}.png")
            (tmp_path / split / f"{row}.txt").write_text(drawn.names[row])
    data = CaptionedImages(
        str(tmp_path / "train"),
        val_root=str(tmp_path / "val"),
        test_root=str(tmp_path / "test"),
        other_prompts=["a cat", "a house"],
        evaluator=str(tmp_path / "pair"),
        batch_size=2,
    )

    def run(name: str, judged: int) -> tuple[StyleTuner, Trainer]:
        torch.manual_seed(0)
        show = Show(every=2, steps=2, num_validation_images=judged)
        module = StyleTuner(str(tmp_path / "unet"), mmpeft.LoRA(rank=2), show=show)
        fit = trainer(tmp_path, max_steps=4, max_epochs=-1, logger=CSVLogger(tmp_path, name=name, version=""))
        fit.fit(module, data)
        assert "val/loss" in fit.callback_metrics
        return module, fit

    plain, _ = run("plain", 0)
    module, fit = run("judged", 4)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters()))  # looking changes nothing
    assert not (tmp_path / "plain" / "scores.csv").exists()
    rows = rows_before(tmp_path / "judged" / "scores.csv", 4)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["base/kid"] == rows[1]["base/kid"]
    assert rows[0]["val/kid"] != rows[1]["val/kid"]
    assert rows_before(tmp_path / "judged" / "scores.csv", 3) == rows[:1]
    assert (tmp_path / "judged" / "scores.png").is_file()
    (found,) = fit.test(module, data, verbose=False)
    kinds = {"base", "test", "plain", "plain_base", "real"}
    assert {f"{kind}/caption" for kind in kinds} <= found.keys()
    assert "plain/kid" in found  # to what the base draws, as there are no images of other prompts
    assert "plain_base/kid" not in found
    own: Any = data.test_set
    images, prompts = zip(*[((own[i]["image"] + 1) / 2, own[i]["prompt"]) for i in range(6)])
    assert own[1]["plain"] == "a house"
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "pair")(
        images=[(image * 255).round().to(torch.uint8) for image in images], return_tensors="pt"
    )
    tokens = AutoTokenizer.from_pretrained(PAIR)(list(prompts), padding=True, return_tensors="pt")
    with torch.no_grad():
        likeliest = pair(**tokens, **pixels).logits_per_image.argmax(1)
    assert found["real/caption"] == pytest.approx(float((likeliest == torch.arange(6)).float().mean()))


def test_an_evaluator_that_is_none_is_refused_before_training(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    CLIPImageProcessor().save_pretrained(tmp_path / "text")
    for name, message in ((tmp_path / "text", "expected an image-text pair"), (tmp_path / "none", "cannot load")):
        with pytest.raises(ConfigError, match=message):
            PairJudge(str(name))
    with pytest.raises(ConfigError, match="val_root or test_root"):
        CaptionedImages(str(tmp_path), evaluator="anything")


def test_what_the_data_say(tmp_path: Path) -> None:
    data = EmojiStyle(template="{}, outlined", test_images=9)
    data.configure(32, 4)
    sample: Any = data.test_set[0]  # type: ignore[index]
    assert sample["prompt"] == f"{sample['plain']}, outlined"
    assert sample["plain_image"].shape == sample["image"].shape == (3, 32, 32)
    assert len({int(data.test_set[i]["label"]) for i in range(9)}) > 5  # type: ignore[index]
    assert all(prompt.endswith(", outlined") for prompt in (*data.prompts(), *data.val_prompts()))
    for options in ({"template": "outlined"}, {"test_images": 0}):
        with pytest.raises(ConfigError):
            EmojiStyle(**options)

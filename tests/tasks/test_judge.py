"""The evaluators know real drawings, and a test run judges base, tuned and real drawings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import mmpeft
from mmpeft.diffusion.data.emoji import EmojiStyle, spread
from mmpeft.diffusion.grid import Show
from mmpeft.diffusion.judge import Judge
from mmpeft.diffusion.style import StyleTuner
from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError
from tests.tasks.tiny import trainer
from tests.tasks.tiny_pipelines import sized


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Trained on 300 identities: enough for a test."""
    identity = emoji("openmoji", "train").identity
    kept = spread(emoji("openmoji", "train").labels, 300, 0)
    return Judge(32, sorted(set(identity.tolist()) - set(identity[kept].tolist())))


def test_real_drawings_are_told_apart(judge: Judge) -> None:
    real, other = (emoji(style, "test", 32) for style in ("openmoji", "noto"))
    images, others = (drawn.rgb()[::4].float() / 255 for drawn in (real, other))
    own = judge.accuracy(images, "openmoji", real.labels[::4])
    assert own["style"] > 0.8
    assert own["caption"] > 0.45  # nine categories
    assert judge.accuracy(others, "openmoji", real.labels[::4])["style"] < 0.2
    mean, spread_ = judge.kid(images[::2], images[1::2])
    assert abs(mean) < 2 * spread_  # two halves of one style: the estimate is unbiased
    assert judge.kid(others, images)[0] > 0.2
    assert judge.kid(others, images) == judge.kid(others, images)


def test_a_test_run_judges_what_is_drawn(tmp_path: Path) -> None:
    sized(32).save_pretrained(tmp_path / "unet")
    method = mmpeft.LoRA(rank=2, at="attn.*")
    module = StyleTuner(
        str(tmp_path / "unet"), method, show=Show(steps=2), optimizer=partial(torch.optim.AdamW, lr=1e-2)
    )
    data = EmojiStyle(images=1250, template="{}, outlined", test_images=18, batch_size=4)
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

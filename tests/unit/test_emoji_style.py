"""Drawings of one style with their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmpeft.diffusion.data import EmojiStyle
from mmpeft.diffusion.family import FACTS
from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError, DataError
from tests.unit.captioned_pictures import epoch, same


def style(resolution: int = 32, **options: Any) -> EmojiStyle:
    data = EmojiStyle(**options)
    data.setup("fit")
    data.configure(resolution, 4)
    return data


@pytest.mark.parametrize("size", [32, 64])
def test_drawings_on_white_with_their_names(size: int) -> None:
    data = style(size, images=8, batch_size=8)
    (batch,) = list(data.train_dataloader())
    assert batch["image"].shape == (8, 3, size, size)
    assert batch.keys() == {"image", "prompt", "key", *FACTS}
    assert batch["original_size"].tolist() == [[64, 64]] * 8
    assert batch["target_size"].tolist() == [[size, size]] * 8
    assert batch["crop"].tolist() == [[0, 0]] * 8
    assert float(batch["image"].max()) == 1.0
    known = emoji("openmoji", "train", size)
    row = data.rows[0]
    assert torch.equal(data.train_set[0]["image"], known.rgb()[row].float() / 127.5 - 1)
    assert data.train_set[0]["prompt"] == known.names[row].lower()


def test_training_drawings_are_of_all_categories_and_nested() -> None:
    labels = emoji("openmoji", "train").labels
    few, many = style(images=64), style(images=65)
    assert set(few.rows) < set(many.rows)
    counts = labels[few.rows].bincount(minlength=9)
    expected = labels.bincount(minlength=9) * 64 / len(labels)
    assert (counts - expected).abs().max() <= 1
    assert few.rows == style(images=64).rows != style(images=64, seed=1).rows
    assert len(style(images=None).rows) == len(labels) == style(images=None).samples
    assert len(few.train_set) == few.samples == 64
    assert len(style(images=64, repeats=3).train_set) == 192


def test_validation_is_of_other_identities() -> None:
    data = style()
    train = {sample["key"] for sample in data.train_set}
    for part, size in ((data.val_set, len(emoji("openmoji", "val"))), (data.test_set, data.test_images)):
        assert len(part) == size
        assert train.isdisjoint(sample["key"] for sample in part)
    assert len(data.val_prompts()) == len(set(data.val_prompts())) == 8
    assert data.val_prompts() == style(seed=3).val_prompts()
    assert data.val_prompts(4) == data.val_prompts()[:4]
    names = {name.lower() for name in emoji("openmoji", "train").names}
    assert names.isdisjoint(data.val_prompts())
    assert set(data.val_prompts()) <= {sample["prompt"] for sample in data.val_set} <= set(data.prompts())
    assert len(next(iter(data.val_dataloader()))["prompt"]) == 128


def test_captions_change_from_epoch_to_epoch_where_any_may_be_said() -> None:
    data = style(images=16, captions="any")
    epochs = [epoch(data.train_dataloader(), number)[0] for number in range(3)]
    said = [dict(zip(batch["key"], batch["prompt"])) for batch in epochs]
    assert said[0] != said[1] != said[2]
    assert same(epochs, [epoch(data.train_dataloader(), number)[0] for number in range(3)])
    assert {text for one in said for text in one.values()} <= set(data.prompts())
    fixed = style(images=16)
    names = [dict(zip(b["key"], b["prompt"])) for n in range(2) for b in epoch(fixed.train_dataloader(), n)]
    assert names[0] == names[1]


def test_a_resumed_run_on_emoji_gets_the_remaining_batches() -> None:
    whole = epoch(style(captions="any").train_dataloader(), 2)
    first = style(captions="any").train_dataloader()
    first.sampler.set_epoch(2)
    batches = iter(first)
    seen = [next(batches)]
    second = style(captions="any").train_dataloader()
    second.load_state_dict(first.state_dict())
    assert same(seen + list(second), whole)


def test_wrong_emoji_options() -> None:
    with pytest.raises(ConfigError, match=r"style.*'openmojy'.*Did you mean 'openmoji'"):
        EmojiStyle("openmojy")
    with pytest.raises(ConfigError, match="captions is name or any"):
        EmojiStyle(captions="all")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images is a number of training drawings in 1 … 1371, got 5000"):
        EmojiStyle(images=5000)
    with pytest.raises(ConfigError, match="resolution is 32 or 64, got 512"):
        style(512)

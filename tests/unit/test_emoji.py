"""The emoji world: what the sets hold, how they are split, and how they are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmpeft.embedded
from mmpeft.embedded import SPLITS, STYLES, emoji
from mmpeft.embedded.build_emoji import figure
from mmpeft.embedded.emoji import _resize, composite
from mmpeft.errors import ConfigError

PARTS = ("train", "val", "test")


@pytest.mark.parametrize("style", STYLES)
def test_every_style_draws_the_same_emoji(style):
    found = emoji(style, "all")
    assert found.images.shape == (1906, 4, 64, 64)
    assert found.images.dtype == torch.uint8
    assert found.identity.tolist() == list(range(1906))
    assert len(found.classes) == 9
    assert found.classes == sorted(found.classes)
    assert "Component" not in found.classes
    assert found.labels.dtype == torch.int64
    assert torch.bincount(found.labels).tolist() == [85, 159, 270, 131, 264, 386, 169, 224, 218]
    assert found.unified == emoji("noto", "all").unified
    assert (found.images[:, 3].flatten(1).amax(1) > 0).all()  # no empty drawing
    row = found.names.index("grinning face")
    assert found.unified[row] == "1F600"
    assert found.keywords[row][0] == "grinning"
    assert found.classes[found.labels[row]] == "Smileys & Emotion"
    assert found.subcategories[found.sublabels[row]] == "face-smiling"


def test_splits_are_disjoint_stratified_and_the_same_for_all_styles():
    sets = {part: emoji("openmoji", part) for part in PARTS}
    identities = torch.cat([found.identity for found in sets.values()])
    assert identities.sort().values.tolist() == list(range(1906))
    assert {part: len(found) for part, found in sets.items()} == {"train": 1371, "val": 153, "test": 382}
    whole = torch.bincount(emoji("openmoji", "all").labels)
    for part, share in (("test", 0.2), ("val", 0.08)):
        assert torch.equal(torch.bincount(sets[part].labels), (whole * share).round().long())
        for style in STYLES:
            assert torch.equal(emoji(style, part).identity, sets[part].identity)


def test_the_split_never_changes():
    """Pretrained weights rest on it: another split would leak their training emoji into the test."""
    assert emoji("noto", "test").identity[:8].tolist() == [11, 21, 23, 24, 29, 30, 37, 38]
    assert int(emoji("noto", "test").identity.sum()) == 363481
    assert int(emoji("noto", "val").identity.sum()) == 160104


@pytest.mark.parametrize("style", STYLES)
def test_no_drawing_and_no_figure_is_in_two_splits(style):
    drawings: dict[bytes, str] = {}
    figures: dict[str, str] = {}
    for part in PARTS:
        found = emoji(style, part)
        for i in range(len(found)):
            assert drawings.setdefault(found.images[i].numpy().tobytes(), part) == part
            key = figure(found.unified[i], found.subcategories[found.sublabels[i]])
            assert figures.setdefault(key, part) == part


def test_a_set_owns_its_tensors():
    emoji("noto", "val").images.zero_()
    emoji("noto", "all").images.zero_()
    assert emoji("noto", "val").images.any()


def test_samples_and_background():
    found = emoji("openmoji", "val")
    image, label = found[3]
    assert image.shape == (4, 64, 64)
    assert label == int(found.labels[3])
    blue = found.rgb((0, 0, 255))
    clear, solid = found.images[:, 3] == 0, found.images[:, 3] == 255
    assert blue.dtype == torch.uint8
    assert (blue.permute(0, 2, 3, 1)[clear] == torch.tensor([0, 0, 255], dtype=torch.uint8)).all()
    assert torch.equal(blue.permute(0, 2, 3, 1)[solid], found.images[:, :3].permute(0, 2, 3, 1)[solid])


def test_compositing_by_hand():
    rgba = torch.tensor([100, 200, 0, 51], dtype=torch.uint8).view(4, 1, 1)  # alpha = 1/5
    out = composite(rgba, torch.tensor([255, 0, 10], dtype=torch.uint8))
    assert out.flatten().tolist() == [224, 40, 8]  # 20 + 204, 40 + 0, 0 + 8


@pytest.mark.parametrize("size", [24, 100])
def test_resizing_does_not_bleed_invisible_colour_into_edges(size):
    rgba = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    rgba[:, 0, 16:48, 16:48] = 255  # a red square; black hides under the transparency around it
    rgba[:, 3, 16:48, 16:48] = 255
    out = _resize(rgba, size)
    seen = out[:, 3] > 0
    assert ((out[:, 3] > 0) & (out[:, 3] < 255)).any()
    assert (out[:, 0][seen] >= 254).all()
    assert (out[:, :3].permute(0, 2, 3, 1)[~seen] == 0).all()


def test_resizing_commutes_with_compositing():
    found = emoji("noto", "val")
    small = emoji("noto", "val", size=32).rgb().float()
    direct = torch.nn.functional.interpolate(found.rgb().float(), size=(32, 32), mode="bilinear", antialias=True)
    assert (small - direct).abs().max() <= 3  # rounding of colour at low alpha
    assert (small - direct).abs().mean() < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "openmojis"}, "Did you mean 'openmoji'"),
        ({"split": "tests"}, "Did you mean 'test'"),
        ({"size": 0}, "1..1024"),
        ({"size": 64.0}, "1..1024"),
    ],
)
def test_wrong_names_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        emoji(**options)
    assert "all" in SPLITS


@pytest.mark.parametrize("background", [(255, 255), (0, 0, 256)])
def test_wrong_backgrounds_are_refused(background):
    with pytest.raises(ConfigError, match="three integers"):
        emoji("openmoji", "val").rgb(background)


def test_package_data_are_small_and_attributed():
    folder = Path(mmpeft.embedded.__file__).parent / "data"
    for path in folder.iterdir():
        assert path.stat().st_size < 4 * 2**20, path
    text = (folder / "ATTRIBUTION.md").read_text("utf-8")
    for word in ("Noto Emoji", "Apache-2.0", "Twemoji", "CC-BY 4.0", "OpenMoji", "CC-BY-SA 4.0"):
        assert word in text

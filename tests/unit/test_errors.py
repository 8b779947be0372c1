"""What errors say, and what they are."""

from __future__ import annotations

import pytest
import timm

import mmpeft
from mmpeft.errors import AdapterFileError, CheckpointError, ConfigError, FileError, StateError, expect


def test_an_error_of_attach_says_to_what_and_as_what() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(mmpeft.errors.SiteError) as caught:
        mmpeft.attach(model, mmpeft.LoRA(at="attn.qq"), name="first")
    (note,) = caught.value.__notes__
    assert note.startswith("attaching 'first' to VisionTransformer: LoRA(at='attn.qq'")


def test_what_is_wrong_in_time_is_still_the_error_that_it_was() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    mmpeft.attach(model, mmpeft.BitFit())
    with pytest.raises(StateError, match="attached already") as caught:
        mmpeft.attach(model, mmpeft.BitFit())
    assert isinstance(caught.value, ConfigError)
    assert issubclass(CheckpointError, AdapterFileError)
    assert issubclass(AdapterFileError, FileError)


def test_expect_names_owner_value_and_what_is_wanted() -> None:
    expect(True, "LoRA", "dropout", 0.5, "in [0, 1)")
    with pytest.raises(ConfigError, match=r"LoRA: dropout must be in \[0, 1\), got 1.5"):
        expect(False, "LoRA", "dropout", 1.5, "in [0, 1)")

"""Towers of models that read several things: their names, their blocks in order, and which one ends at the output."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.sites import Site, structure
from tests.support.small import small
from tests.unit.toy import Layer

Lists = tuple[tuple[str, int], ...]
"""Paths of lists of blocks, in the order in which they run, and how many blocks each has."""

BELOW: dict[str, dict[str, Lists]] = {
    "clip": {},
    "owlvit": {},
    "blip-2": {"image": (("vision_model.encoder.layers", 4),), "queries": (("qformer.encoder.layer", 4),)},
    "llava": {"image": (("model.vision_tower.encoder.layers", 4),)},
    "qwen2_5_vl": {"image": (("model.visual.blocks", 4),)},
    "internvl": {"image": (("model.vision_tower.encoder.layer", 4),)},
    "t5": {"encoder": (("encoder.block", 4),)},
    "bart": {"encoder": (("model.encoder.layers", 4),)},
    "whisper": {"encoder": (("model.encoder.layers", 4),)},
    "wav2vec2": {},
    "speecht5": {"encoder": (("speecht5.encoder.wrapped_encoder.layers", 4),)},
    "detr": {
        "backbone": tuple((f"model.backbone.model.layer{i}", 2) for i in (1, 2, 3, 4)),
        "encoder": (("model.encoder.layers", 4),),
    },
    "maskformer": {
        "image": tuple((f"model.pixel_level_module.encoder.model.encoder.layers.{i}.blocks", 2) for i in range(4))
    },
    "segformer": {},
    "sam": {"vision_encoder": (("vision_encoder.layers", 4),)},
    "florence2": {
        "image": tuple((f"model.vision_tower.blocks.{i}", n) for i, n in enumerate((1, 1, 2, 1))),
        "encoder": (("model.language_model.encoder.layers", 4),),
    },
    "flava": {"text": (("text_model.encoder.layer", 4),), "image": (("image_model.encoder.layer", 4),)},
    "lxmert": {"image": (("encoder.r_layers", 4),)},
}
"""Towers that give what another one reads."""

LAST: dict[str, dict[str, Lists]] = {
    "clip": {"text": (("text_model.encoder.layers", 4),), "image": (("vision_model.encoder.layers", 4),)},
    "owlvit": {"text": (("text_model.encoder.layers", 4),), "image": (("vision_model.encoder.layers", 4),)},
    "blip-2": {"lm": (("language_model.model.decoder.layers", 4),)},
    "llava": {"lm": (("model.language_model.layers", 4),)},
    "qwen2_5_vl": {"lm": (("model.language_model.layers", 4),)},
    "internvl": {"lm": (("model.language_model.layers", 4),)},
    "t5": {"decoder": (("decoder.block", 4),)},
    "bart": {"decoder": (("model.decoder.layers", 4),)},
    "whisper": {"decoder": (("model.decoder.layers", 4),)},
    "wav2vec2": {"audio": (("wav2vec2.encoder.layers", 4),)},
    "speecht5": {"decoder": (("speecht5.decoder.wrapped_decoder.layers", 4),)},
    "detr": {"decoder": (("model.decoder.layers", 4),)},
    "maskformer": {"queries": (("model.transformer_module.decoder.layers", 4),)},
    "segformer": {"image": tuple((f"segformer.stages.{i}.blocks", 2) for i in range(4))},
    "sam": {"mask_decoder": (("mask_decoder.transformer.layers", 2),)},
    "florence2": {"decoder": (("model.language_model.decoder.layers", 4),)},
    "flava": {"multimodal_model": (("multimodal_model.encoder.layer", 4),)},
    "lxmert": {"text": (("encoder.layer", 4), ("encoder.x_layers", 4))},
}
"""Towers that end at the output."""

ENTRIES = {
    "clip": {"text_model.embeddings.token_embedding": "text", "vision_model.embeddings.patch_embedding": "image"},
    "blip-2": {"vision_model.embeddings.patch_embedding": "image"},
    "llava": {"model.vision_tower.embeddings.patch_embedding": "image", "model.language_model.embed_tokens": "lm"},
    "t5": {"encoder.embed_tokens": "encoder", "decoder.embed_tokens": "decoder"},
    "whisper": {"model.encoder.conv1": "encoder", "model.decoder.embed_tokens": "decoder"},
    "speecht5": {"speecht5.encoder.prenet.feature_encoder.conv_layers.0.conv": "encoder"},
    "detr": {"model.backbone.model.conv1": "backbone"},
    "sam": {"vision_encoder.patch_embed.projection": "vision_encoder"},
    "florence2": {"model.vision_tower.convs.0.conv": "image"},
}
"""Where each tower reads its data."""


@cache
def _found(kind: str) -> list[Site]:
    return structure(small(kind))


def _paths(lists: Lists) -> list[str]:
    return [f"{path}.{i}" for path, count in lists for i in range(count)]


@pytest.mark.parametrize("kind", LAST)
def test_towers_have_their_blocks_in_the_order_of_the_pass(kind: str) -> None:
    blocks = [s for s in _found(kind) if s.role == "block"]
    found = {s.tower: [(b.depth, b.path) for b in blocks if b.tower == s.tower] for s in blocks}
    expected = {tower: list(enumerate(_paths(lists))) for tower, lists in (BELOW[kind] | LAST[kind]).items()}
    assert {tower: sorted(own) for tower, own in found.items()} == expected


@pytest.mark.parametrize("kind", LAST)
def test_towers_that_others_read_are_below(kind: str) -> None:
    blocks = [s for s in _found(kind) if s.role == "block"]
    assert {s.tower for s in blocks if s.below} == set(BELOW[kind])
    assert {s.tower for s in blocks if not s.below} == set(LAST[kind])


@pytest.mark.parametrize("kind", ENTRIES)
def test_what_reads_the_data_is_of_its_tower(kind: str) -> None:
    found = {s.path: s.tower for s in _found(kind) if s.role == "embed"}
    assert {path: found[path] for path in ENTRIES[kind]} == ENTRIES[kind]


# -- models of one's own ----------------------------------------------------------------------------------------


class Two(nn.Module):
    """A tower of three blocks for pictures, one of two for words; words may read what the pictures became."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.words, self.patches = nn.Embedding(10, 8), nn.Linear(5, 8)
        self.upper = nn.ModuleList(Layer(8) for _ in range(2))
        self.lower = nn.ModuleList(Layer(8) for _ in range(3))
        self.spare = nn.ModuleList(Layer(8) for _ in range(4))

    def forward(self, tokens: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.patches(pixel_values), self.words(tokens)
        for block in self.lower:
            image = block(image)
        if self.joined:
            text = text + image.mean(1, keepdim=True)
        for block in self.upper:
            text = block(text)
        return text.mean(1), text.mean() if self.joined else image.mean(1)


BATCH = (torch.randint(10, (2, 4)), torch.rand(2, 6, 5))
LASTLY = [
    (True, mmpeft.LastBlocks(), {"upper.1"}),
    (True, mmpeft.LastBlocks(blocks=2), {"upper.0", "upper.1"}),
    (True, mmpeft.LastBlocks(at="tower=image"), {"lower.2"}),
    (True, mmpeft.LastBlocks(at="tower=image", blocks=2), {"lower.1", "lower.2"}),
    (False, mmpeft.LastBlocks(), {"upper.1", "lower.2"}),
    (False, mmpeft.LastBlocks(blocks=3), {"upper.0", "upper.1", "lower.0", "lower.1", "lower.2"}),
    (False, mmpeft.LastBlocks(at="tower=text"), {"upper.1"}),
]


@pytest.mark.parametrize(("joined", "method", "expected"), LASTLY)
def test_last_blocks_are_those_before_the_output(joined: bool, method: mmpeft.LastBlocks, expected: set[str]) -> None:
    """Of each tower that ends there, whatever the depth of others; what never runs is no last block."""
    model = Two(joined)
    mmpeft.attach(model, method, example=BATCH)
    trained = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == expected


def test_more_last_blocks_than_the_tower_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"LastBlocks\(blocks=3\): Two has 2 blocks"):
        mmpeft.attach(Two(joined=True), mmpeft.LastBlocks(blocks=3), example=BATCH)


def test_what_did_not_run_is_called_as_its_module_is() -> None:
    towers = {s.path.partition(".")[0]: (s.tower, s.below) for s in structure(Two(True), BATCH) if s.role == "block"}
    assert towers == {"upper": ("text", False), "lower": ("image", True), "spare": ("spare", True)}

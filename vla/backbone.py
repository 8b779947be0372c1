"""Image-text pairs by name: open_clip's registry and hub, local folders, and the one that ships with the suite.

A local folder is open_clip's own (`open_clip_config.json`, `open_clip_model.safetensors`, tokenizer files), so that
what is written here opens there and the other way round. Only safetensors and JSON are read from a folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import open_clip
import torch
from huggingface_hub import hf_hub_download
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from timm.models import VisionTransformer, is_model, register_model
from torch import Tensor, nn

from mmpeft.data.contract import Preprocessing, Resizing
from mmpeft.embedded.store import REMEDY, WEIGHTS, differences, read_card, read_weights, write_weights
from mmpeft.errors import ConfigError, DataError, nearest
from mmpeft.files import write_atomic
from mmpeft.hub.reach import from_hub, why_not
from mmpeft.types import AnyModule, Argument, Json, Untyped

CONFIG, MODEL, CARD = "open_clip_config.json", "open_clip_model.safetensors", "card.json"

Tokenizer = Callable[[Sequence[str]], Tensor]
"""Texts to token numbers, int64 [B, context]; longer texts are cut."""


def vit_emoji_64(pretrained: bool = False, **kwargs: Argument) -> nn.Module:
    """The architecture of `embedded:vit_emoji` under a timm name, for the image tower of `embedded:clip_emoji`."""
    architecture = read_card(WEIGHTS / "vit_emoji.json")["architecture"]
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    model: nn.Module = VisionTransformer(**{**architecture, "num_classes": 0, **kwargs})
    facts = {"pool_size": None, "input_size": (3, 64, 64), "classifier": "head"}
    model.__dict__.update(pretrained_cfg=facts, default_cfg=facts)
    return model


if not is_model("vit_emoji_64"):
    register_model(vit_emoji_64)


class ImageTextPair(Protocol):
    """What tasks use of open_clip's models, which have no types."""

    visual: nn.Module
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor: ...

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor: ...


def towers_of(model: nn.Module) -> ImageTextPair:
    """A pair, with types."""
    return cast(ImageTextPair, model)


def create(name: str, pretrained: bool = True, image_size: int | None = None) -> nn.Module:
    """Build an image-text pair on the CPU in fp32.

    Args:
        name: `<architecture>/<tag>` such as `ViT-B-16/laion2b_s34b_b88k`, `hf-hub:<repository>`,
            `local-dir:<folder>` or the folder alone, or `embedded:<name>`. Without weights, `<architecture>` will do.
        pretrained: load weights; otherwise only the architecture is taken.
        image_size: height and width in pixels; position embeddings are resampled.

    Raises:
        ConfigError: an unknown name, or weights that cannot be fetched or do not fit.
    """
    local = folder_of(name)
    if local is not None:
        return _local(local, pretrained, image_size)
    hub = name.startswith("hf-hub:")
    arch, _, tag = (name, "", "") if hub else name.partition("/")
    if not hub:
        _check(arch, tag, pretrained)
    try:
        with from_hub():
            model: nn.Module = open_clip.create_model(
                arch, tag or None if pretrained else None, load_weights=pretrained, force_image_size=image_size
            )
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot load {name}: {reason}{why_not()}; {REMEDY}") from error
    return model


def tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a pair, by the name `create` takes.

    Raises:
        ConfigError: its files are missing or cannot be fetched.
    """
    local = folder_of(name)
    source = f"local-dir:{local}" if local else name if name.startswith("hf-hub:") else name.partition("/")[0]
    try:
        with from_hub():
            found: Tokenizer = open_clip.get_tokenizer(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {name}: {str(error).splitlines()[0]}{why_not()}") from error
    return found


def preprocessing(model: AnyModule) -> Preprocessing:
    """Size, mean and std of the images a pair wants, and how open_clip resizes them when it evaluates."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    known: Json = getattr(model.visual, "preprocess_cfg", None) or {}
    mean = known.get("mean") or getattr(model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = known.get("std") or getattr(model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    mode: Untyped = known.get("resize_mode") or "shortest"
    how = known.get("interpolation") or "bicubic"
    if mode == "shortest" and height != width:
        how = "bicubic"  # whatever is configured: so does open_clip
    resizing = Resizing(mode, "bicubic" if how == "random" else how, fill=known.get("fill_color") or 0)
    place, mean, std = (int(height), int(width)), tuple(map(float, mean)), tuple(map(float, std))
    fixed = hasattr(model.visual, "positional_embedding") or hasattr(model.visual, "attnpool")
    return Preprocessing(place, mean, std, resizing, fixed=fixed)


def check_length(texts: Sequence[str], tokens: Tokenizer) -> None:
    """Raise DataError if a text does not fit the context: what was cut off would be missing without a word."""
    own: Untyped = tokens
    context = int(own.context_length)
    pad = own([""], context_length=context + 1)[0, -1]
    for start in range(0, len(texts), 4096):
        part = list(texts[start : start + 4096])
        for text, row in zip(part, own(part, context_length=context + 1)):
            if row[-1] != pad:
                said = text if len(text) <= 60 else f"{text[:60]}…"
                raise DataError(f"a text is longer than the {context} tokens the text tower takes; shorten {said!r}")


def folder_of(name: str) -> Path | None:
    """The folder a name stands for; None for names of open_clip's registry and of the hub.

    Raises:
        ConfigError: there is no such folder, or no such embedded pair.
    """
    if name.startswith("embedded:"):
        own = name.removeprefix("embedded:")
        known = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CONFIG}"))
        if own not in known:
            raise ConfigError(f"no embedded pair {own!r}; embedded: {', '.join(known) or 'none'}.{nearest(own, known)}")
        return WEIGHTS / own
    if name.startswith("local-dir:") or Path(name).is_dir():
        path = Path(name.removeprefix("local-dir:")).expanduser()
        if not (path / CONFIG).is_file():
            raise ConfigError(f"{path} has no {CONFIG}; expected a folder of open_clip's layout")
        return path
    return None


def save(model: nn.Module, folder: Path, config: Json, tensors: dict[str, Tensor], **card: Argument) -> None:
    """Write open_clip's folder: its configuration, the tensors in fp16, and a card with their hash.

    Raises:
        ConfigError: the configuration describes another model.
    """
    with torch.device("meta"):
        twin = build(config["model_cfg"])
    problem = differences(twin, tensors, finite=False)
    if problem:
        raise ConfigError(f"the configuration describes another model: {problem}")
    write_weights(tensors, folder / MODEL, folder / CARD, card)
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def described(name: str) -> Json:
    """The architecture of a pair of open_clip's registry or of the hub, as its configuration has it."""
    if name.startswith("hf-hub:"):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        with from_hub():
            file = hf_hub_download(repository, CONFIG, revision=revision or None)
        found: Json = read_card(Path(file))["model_cfg"]
        return found
    return open_clip.get_model_config(name.partition("/")[0]) or {}


def build(model_cfg: Json) -> nn.Module:
    """A pair with random weights by open_clip's configuration dictionary."""
    known = copy.deepcopy(model_cfg)
    custom = known.pop("custom_text", False) or "hf_model_name" in known.get("text_cfg", {})
    kind = open_clip.CoCa if "multimodal_cfg" in known else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        model: nn.Module = kind(**known)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"the model_cfg of {CONFIG} does not describe a model of open_clip: {error}") from error
    return model


def _local(folder: Path, pretrained: bool, image_size: int | None) -> nn.Module:
    config = read_card(folder / CONFIG)
    if "model_cfg" not in config:
        raise ConfigError(f"{folder / CONFIG} has no model_cfg")
    model = build(config["model_cfg"])
    tower: AnyModule = model.visual
    if pretrained:
        card = folder / CARD
        tensors = read_weights(folder / MODEL, read_card(card).get("sha256") if card.is_file() else None)
        problem = differences(model, tensors)
        if problem:
            raise ConfigError(f"{folder / MODEL} does not fit {folder / CONFIG}: {problem}")
        model.load_state_dict(tensors)
    facts = {"size": tower.image_size, **config.get("preprocess_cfg", {})}
    set_model_preprocess_cfg(model, merge_preprocess_dict(PreprocessCfg(), facts))
    if image_size is not None:
        if not hasattr(tower, "set_input_size"):
            raise ConfigError(f"the image tower of {folder} takes no other size than {tower.image_size}")
        tower.set_input_size(image_size)
        tower.image_size = (image_size, image_size)
    return model


def _check(arch: str, tag: str, pretrained: bool) -> None:
    known = open_clip.list_models()
    if arch not in known:
        raise ConfigError(
            f"unknown pair {arch!r}.{nearest(arch, known)} open_clip.list_models() has all names; a local folder is "
            "given as local-dir:<folder>, the shipped pair as embedded:clip_emoji"
        )
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if pretrained and tag not in tags:
        what = f"no pretrained tag {tag!r}" if tag else "several pretrained weights: choose one"
        if not tags:
            raise ConfigError(f"open_clip knows no pretrained weights of {arch}; {REMEDY}")
        raise ConfigError(f"{arch} has {what}, as in {arch}/<tag>; tags: {', '.join(tags)}.{nearest(tag, tags)}")

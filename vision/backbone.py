"""Image backbones by name: timm's registry and hub, local folders and files, and the ones that ship with the suite.

A *card* is the JSON beside a weight file: `{"architecture": …, "num_classes": …, "pretrained_cfg": {mean, std,
input_size}, …}`. `architecture` is a timm name, or keyword arguments of timm's VisionTransformer (embedded backbones).
Only safetensors and JSON are read from local files, never a pickle.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmpeft.data.contract import Preprocessing, Resize, Resizing
from mmpeft.embedded.store import (
    REMEDY,
    WEIGHTS,
    backbone_tensors,
    differences,
    read_card,
    read_weights,
    write_weights,
)
from mmpeft.errors import ConfigError, nearest
from mmpeft.hub.reach import from_hub, why_not
from mmpeft.types import AnyModule, Argument, Facts, Json, Kwargs

log = logging.getLogger(__name__)
CROPS: dict[str, Resize] = {"center": "shortest", "squash": "squash", "border": "longest"}

Build = Callable[..., nn.Module]


def create(name: str, num_classes: int = 0, pretrained: bool = True, **kwargs: Argument) -> nn.Module:
    """Build an image backbone with a new head.

    Args:
        name: a timm name (`vit_base_patch16_224.orig_in21k`, `hf-hub:…`), `embedded:<name>`, `local-dir:<folder>` with
            `config.json` and `model.safetensors`, or the path of such a folder or of a `.safetensors` file. A file
            needs a card (`<stem>.json` or `config.json` beside it) or the argument `architecture=<timm name>`.
        num_classes: outputs of the head; 0 for none. A pretrained head is kept if it has as many.
        pretrained: load weights; otherwise only the architecture is taken.
        kwargs: further arguments of the model, such as `drop_path_rate` or `img_size`.

    Raises:
        ConfigError: an unknown name, weights that cannot be fetched or do not fit, or arguments the model lacks.
    """
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
        raise ConfigError(f"num_classes must be an integer >= 0 (0: no head), got {num_classes!r}")
    channels = kwargs.get("in_chans")
    local = Path(name.removeprefix("local-dir:")).expanduser()
    if name.startswith("embedded:"):
        model = _embedded(name.removeprefix("embedded:"), num_classes, pretrained, kwargs)
    elif name.startswith("local-dir:") or local.suffix == ".safetensors" or local.is_dir():
        model = _local(local, num_classes, pretrained, kwargs)
    else:
        model = _registered(name, num_classes, pretrained, kwargs)
    if channels is not None:  # of which timm's configuration says nothing
        known: AnyModule = model
        size = tuple(known.pretrained_cfg.get("input_size") or (3, 224, 224))[-2:]
        known.pretrained_cfg = {**known.pretrained_cfg, "input_size": (channels, *size)}
    return model


def normalisation(model: nn.Module) -> Preprocessing:
    """Size, mean, std and channels of the images a backbone wants, and how timm resizes them when it evaluates.

    The size is the one the model was built for; where it takes any size, the one it was pretrained with.
    """
    config: Facts = getattr(model, "pretrained_cfg", None) or {}
    patches = getattr(model, "patch_embed", None)
    own = getattr(patches, "img_size", None)
    height, width = own or tuple(config.get("input_size") or (3, 224, 224))[-2:]
    mean = tuple(map(float, config.get("mean") or IMAGENET_DEFAULT_MEAN))
    std = tuple(map(float, config.get("std") or IMAGENET_DEFAULT_STD))
    channels = int((config.get("input_size") or (3,))[0])
    fixed = own is not None and bool(getattr(patches, "strict_img_size", False))
    return Preprocessing((int(height), int(width)), mean, std, _resizing(config, mean), channels, fixed)


def _resizing(config: Facts, mean: Sequence[float]) -> Resizing:
    """What `timm.data.create_transform` does with a configuration; ours without `crop_pct` were trained on squares."""
    if not config.get("crop_pct"):
        return Resizing()
    mode = CROPS.get(config.get("crop_mode") or "center", "shortest")
    how = config.get("interpolation") or "bicubic"
    fill = tuple(round(255 * value) for value in mean)
    return Resizing(mode, "bilinear" if how == "random" else how, float(config["crop_pct"]), fill)


def embedded_names() -> list[str]:
    """Names of the backbones that ship with the suite."""
    return sorted(path.stem for path in WEIGHTS.glob("*.json") if path.with_suffix(".safetensors").is_file())


# -- timm's registry and hub --------------------------------------------------------------------------------


def _registered(name: str, num_classes: int, pretrained: bool, kwargs: Kwargs) -> nn.Module:
    if not name.startswith(("hf-hub:", "hf_hub:")):
        check_name(name)
    if pretrained and re.fullmatch(r"vit_\w+_in21k", name):
        log.warning(
            "%s is timm's alias of %s.augreg_in21k; the published VTAB-1k and FGVC numbers belong to "
            "vit_base_patch16_224.orig_in21k: give the tag to choose",
            name,
            name.removesuffix("_in21k"),
        )
    try:
        with from_hub() if pretrained else nullcontext():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
        return model
    except TypeError as error:
        raise ConfigError(f"{name} does not take these arguments: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        # OSError covers every failed download: huggingface_hub's, requests' and urllib's errors descend from it.
        if not pretrained:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot load the pretrained weights of {name}: {reason}{why_not()}; {REMEDY}") from error


def check_name(name: str) -> None:
    """Raise ConfigError with the nearest names unless timm knows the architecture and the tag."""
    if not timm.is_model(name):
        known = [*timm.list_models(), *timm.list_pretrained(), *(f"embedded:{own}" for own in embedded_names())]
        hint = nearest(name, known)
        raise ConfigError(
            f"unknown backbone {name!r}.{hint} timm.list_models() has all names; a local folder is given by its path, "
            f"a shipped backbone as embedded:<name> ({', '.join(embedded_names()) or 'none installed'})"
        )
    base, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise ConfigError(
            f"{base} has no pretrained tag {tag!r}; its tags: {', '.join(tags) or 'none'}.{nearest(tag, tags)}"
        )


# -- local weights ------------------------------------------------------------------------------------------


def _local(path: Path, num_classes: int, pretrained: bool, kwargs: Kwargs) -> nn.Module:
    """A folder in timm's layout, or one weight file with a card or a named architecture."""
    weights = path if path.suffix == ".safetensors" else path / "model.safetensors"
    architecture = kwargs.pop("architecture", None)
    if architecture is not None:
        check_name(architecture)
        return _timm_file(architecture, weights, num_classes, pretrained, kwargs)
    cards = [weights.with_suffix(".json"), weights.with_name("config.json")]
    card = next((card for card in cards if card.is_file()), None)
    if card is None:
        raise ConfigError(
            f"cannot tell the architecture of {path}: none of {', '.join(map(str, cards))} exists; pass "
            "architecture=<timm name>, or a folder written by timm's save_for_hf (config.json and model.safetensors)"
        )
    if isinstance(read_card(card).get("architecture"), str):
        source = f"local-dir:{weights.parent}" if card.name == "config.json" else read_card(card)["architecture"]
        model: AnyModule = _timm_file(source, weights, num_classes, pretrained, kwargs)
        if card.name != "config.json":
            model.pretrained_cfg = {**model.pretrained_cfg, **read_card(card).get("pretrained_cfg", {})}
        timm_model: nn.Module = model
        return timm_model
    return _carded(card, weights, num_classes, pretrained, kwargs)


def _timm_file(source: str, weights: Path, num_classes: int, pretrained: bool, kwargs: Kwargs) -> nn.Module:
    """A timm architecture with weights from a file, strictly."""

    def build(**more: Argument) -> nn.Module:
        try:
            model: nn.Module = timm.create_model(source, **{**kwargs, **more})
            return model
        except TypeError as error:
            raise ConfigError(f"{source} does not take these arguments: {error}") from error

    if not pretrained:
        return build(num_classes=num_classes)
    tensors = read_weights(weights)
    model: AnyModule = build()
    rows = _head_rows(model, tensors)
    if rows != getattr(model, "num_classes", rows):
        model.reset_classifier(rows)
    problem = differences(model, tensors)
    if problem:
        # A file in a family's original layout, or for another image size: timm's converter knows how to read it.
        overlay = {"state_dict": tensors, "source": "", "num_classes": rows}
        try:
            model = build(pretrained=True, num_classes=rows, pretrained_cfg_overlay=overlay)
        except (RuntimeError, KeyError, AssertionError, ValueError) as error:
            raise ConfigError(f"{weights} does not fit {source}: {problem}") from error
    else:
        model.load_state_dict(tensors)
    return _with_head(model, num_classes)


def _embedded(name: str, num_classes: int, pretrained: bool, kwargs: Kwargs) -> nn.Module:
    card, weights = WEIGHTS / f"{name}.json", WEIGHTS / f"{name}.safetensors"
    if name not in embedded_names():
        known = embedded_names()
        raise ConfigError(
            f"no embedded backbone {name!r}; embedded: {', '.join(known) or 'none installed'}.{nearest(name, known)}"
        )
    return _carded(card, weights, num_classes, pretrained, kwargs)


def _carded(card: Path, weights: Path, num_classes: int, pretrained: bool, kwargs: Kwargs) -> nn.Module:
    """A VisionTransformer whose card holds its keyword arguments."""
    facts = read_card(card)
    if not isinstance(facts.get("architecture"), dict):
        raise ConfigError(f"{card} has no `architecture`: a timm name, or keyword arguments of VisionTransformer")
    size = kwargs.pop("img_size", None)
    try:
        model: AnyModule = VisionTransformer(
            **{**facts["architecture"], **kwargs}, num_classes=int(facts.get("num_classes", 0))
        )
    except TypeError as error:
        raise ConfigError(f"VisionTransformer, built from {card}, does not take these arguments: {error}") from error
    if pretrained:
        tensors = read_weights(weights, facts.get("sha256"))
        problem = differences(model, tensors)
        if problem:
            raise ConfigError(f"{weights} does not fit the architecture in {card}: {problem}")
        model.load_state_dict(tensors)
    if size is not None:
        model.set_input_size(img_size=size)  # resamples the position embedding
    config: Json = {"architecture": weights.stem, "first_conv": "patch_embed.proj", "classifier": "head"}
    channels = int(facts["architecture"].get("in_chans", 3))
    config |= {"num_classes": model.num_classes, "input_size": (channels, *model.patch_embed.img_size)}
    model.pretrained_cfg = model.default_cfg = {**config, **facts.get("pretrained_cfg", {})}
    return _with_head(model, num_classes)


def save_embedded(model: nn.Module, name: str, folder: str | Path, card: Facts) -> Path:
    """Write `<name>.safetensors` (fp16) and its card `<name>.json`; return the weight file.

    The backbone alone is written, whatever tuning it carries; merge first to keep what was learned. The card gets
    the hash of the weights, so that a pair cut apart by a crash is noticed when it is read.

    Raises:
        ConfigError: the card's architecture has other tensors, or a value does not survive fp16.
    """
    own = backbone_tensors(model)
    with torch.device("meta"):
        twin = VisionTransformer(**card["architecture"], num_classes=int(card.get("num_classes", 0)))
    problem = differences(twin, own, finite=False)
    if problem:
        raise ConfigError(f"the card of {name!r} describes another model: {problem}")
    path = Path(folder) / f"{name}.safetensors"
    write_weights(own, path, path.with_suffix(".json"), {**card, "name": name})
    return path


# -- small shared steps -------------------------------------------------------------------------------------


def _head_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """Number of classes in a file: 0 if it has no head."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    weight = tensors.get(f"{names if isinstance(names, str) else names[0]}.weight")
    return 0 if weight is None else len(weight)


def _with_head(model: nn.Module, num_classes: int) -> nn.Module:
    """The model with a fresh head, unless it has one of that size."""
    of_timm: AnyModule = model
    if of_timm.num_classes != num_classes:
        of_timm.reset_classifier(num_classes)
    return model

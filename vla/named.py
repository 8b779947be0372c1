"""open_clip's models by name, without weights."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from mmpeft.embedded.store import WEIGHTS
from mmpeft.errors import ConfigError, nearest
from mmpeft.types import Json

CONFIG = "open_clip_config.json"


def knows(name: str) -> bool:
    """A configuration of open_clip's, with or without a tag, a folder of its layout, or an embedded pair."""
    if name.startswith("embedded:"):
        return (WEIGHTS / name.removeprefix("embedded:") / CONFIG).is_file()
    if (Path(name).expanduser() / CONFIG).is_file():
        return True
    return name.partition("/")[0] in names()


def names() -> list[str]:
    """open_clip's configurations, read from its folder: importing it takes seconds."""
    spec = find_spec("open_clip")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return sorted(file.stem for folder in folders for file in (folder / "model_configs").glob("*.json"))


def build(name: str) -> nn.Module:
    """The pair that a configuration describes; towers of other libraries on random weights too."""
    from mmpeft.vla import backbone

    if backbone.folder_of(name) is not None:
        return backbone.create(name, pretrained=False)
    arch = name.partition("/")[0]
    config = backbone.described(name if name.startswith("hf-hub:") else arch)
    if not config:
        raise ConfigError(f"open_clip has no configuration {arch!r}.{nearest(arch, names())}")
    try:
        return backbone.build(_random(config))
    except OSError as error:  # the configuration of a text tower that lies on the hub
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"open_clip:{name} takes a configuration from the hub, which does not answer: {reason}"
        ) from error


def _random(config: Json) -> Json:
    """A configuration that fetches no weights."""
    own = copy.deepcopy(config)
    if "timm_model_name" in own.get("vision_cfg", {}):
        own["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in own.get("text_cfg", {}):
        own["text_cfg"]["hf_model_pretrained"] = False
    return own

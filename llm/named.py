"""transformers' models by name, from their configuration alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from mmpeft.errors import ConfigError, nearest
from mmpeft.types import Config

CONFIG = "config.json"
TASKS = (
    "ImageTextToText",
    "Seq2SeqLM",
    "SpeechSeq2Seq",
    "MaskedLM",
    "CausalLM",
    "CTC",
    "ObjectDetection",
    "ImageClassification",
)
"""Which model a configuration that names none stands for: the first of these that its type has."""


def knows(name: str) -> bool:
    """A folder or file with a configuration of transformers, a type of model such as `bert`, or a repository."""
    config = config_of(name)
    if config is not None:
        return "model_type" in json.loads(config.read_text("utf-8"))
    return name in names() or _is_repository(name)


def names() -> list[str]:
    """Every type of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def build(name: str) -> nn.Module:
    """The model of the class that its configuration names; of a type of model the default configuration."""
    import transformers

    file = config_of(name)
    if file is None and name not in names() and not _is_repository(name):
        hint = nearest(name, names())
        raise ConfigError(f"transformers:{name}: no folder with a {CONFIG}, no repository and no type of model.{hint}")
    try:
        if file is None and name in names():
            config: Config = transformers.AutoConfig.for_model(name)
        else:
            config = transformers.AutoConfig.from_pretrained(file or name)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot read the configuration of {name}: {reason}") from error
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if named is not None:
        model: nn.Module = named(config)
        return model
    for task in TASKS:
        auto = getattr(transformers, f"AutoModelFor{task}")
        if type(config) in auto._model_mapping:
            return auto.from_config(config)  # type: ignore[no-any-return]  # transformers is not followed
    return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return]  # transformers is not followed


def config_of(name: str) -> Path | None:
    """The configuration in a folder, or the file itself."""
    path = Path(name).expanduser()
    file = path if path.suffix == ".json" else path / CONFIG
    return file if file.is_file() else None


def _is_repository(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()

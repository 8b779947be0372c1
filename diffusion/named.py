"""diffusers' models by name, from their configuration alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from mmpeft.embedded.store import WEIGHTS
from mmpeft.errors import ConfigError, nearest
from mmpeft.types import Json

INDEX, CONFIG = "model_index.json", "config.json"
DENOISERS = ("transformer", "unet", "prior")


def knows(name: str) -> bool:
    """A folder of a pipeline (its denoiser) or of a model, a class such as `UNet2DConditionModel`, or `embedded:`."""
    if name.startswith("embedded:"):
        return (WEIGHTS / name.removeprefix("embedded:") / INDEX).is_file()
    path = Path(name).expanduser()
    if path.exists():
        file = _config_of(path)
        return file is not None and "_class_name" in json.loads(file.read_text("utf-8"))
    return bool(re.search("[A-Z]", name)) and name in names()


def names() -> list[str]:
    """Every denoiser that diffusers exports."""
    import diffusers

    return sorted(
        name for name in dir(diffusers) if re.search(r"(UNet|Transformer|DiT)\w*(Model|\dD)$|Transformer2?D?$", name)
    )


def build(name: str) -> nn.Module:
    """The model that a configuration describes; of a class its default one."""
    import diffusers

    path = WEIGHTS / name.removeprefix("embedded:") if name.startswith("embedded:") else Path(name).expanduser()
    if path.exists():
        file = _config_of(path)
        if file is None:
            raise ConfigError(f"{path} has no {INDEX} with one of {', '.join(DENOISERS)}, and no {CONFIG}")
        config: Json = json.loads(file.read_text("utf-8"))
        cls = getattr(diffusers, str(config.get("_class_name")), None)
        if cls is None:
            raise ConfigError(f"{file} is of class {config.get('_class_name')!r}, which diffusers does not have")
        return cls.from_config(config)  # type: ignore[no-any-return]  # diffusers is not followed
    cls = getattr(diffusers, name, None) if re.fullmatch(r"\w+", name) else None
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        try:
            return cls()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name} has no default configuration: {error}; give a folder with its {CONFIG}"
            ) from error
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_hub(name)
    raise ConfigError(f"diffusers:{name} is no folder, no repository and no class of a model.{nearest(name, names())}")


def _config_of(path: Path) -> Path | None:
    """A model's configuration: the file, that in its folder, or in a pipeline's that of the denoiser."""
    places = [path, path / CONFIG] if path.suffix == ".json" else [path / CONFIG]
    places += [path / part / CONFIG for part in DENOISERS] if (path / INDEX).is_file() else []
    return next((place for place in places if place.is_file()), None)


def _from_hub(name: str) -> nn.Module:
    """The denoiser of a repository, of which its configuration alone is fetched."""
    import diffusers
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        index = json.loads(Path(hf_hub_download(name, INDEX)).read_text("utf-8"))
        part = next((part for part in DENOISERS if part in index), None)
    except RemoteEntryNotFoundError:  # one model alone
        part = None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {INDEX} of {name}: {' '.join(str(error).split())[:200]}") from error
    file = hf_hub_download(name, CONFIG, subfolder=part)
    config: Json = json.loads(Path(file).read_text("utf-8"))
    model: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    return model

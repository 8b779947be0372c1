"""Weight files that ship with the suite, and local ones like them: fp16 safetensors beside a JSON card.

The card holds the hash of the weights, so that a pair cut apart by a crash is noticed when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.hosting.modules import CHILD
from mmpeft.types import Facts, Json

WEIGHTS = Path(str(files("mmpeft"))) / "embedded" / "weights"
HALF_MAX = torch.finfo(torch.float16).max
REMEDY = "pass pretrained=False for random weights, a local folder or file, or a shipped backbone (embedded:…)"


def read_card(path: Path) -> Json:
    """The JSON object in a file.

    Raises:
        ConfigError: it is missing or no JSON object.
    """
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no readable JSON card: {error}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(facts).__name__}")
    return facts


def read_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ConfigError: it is missing, cut short, or not the file whose hash is given.
    """
    if not path.is_file():
        raise ConfigError(f"there is no weight file {path}; {REMEDY}")
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ConfigError(f"{path} is not the file its card describes (SHA-256 differs): restore both, or write anew")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is no whole safetensors file: {error}") from error


def write_weights(tensors: Mapping[str, Tensor], path: Path, card_path: Path, card: Facts) -> None:
    """Write tensors in fp16 (integers as they are) and their card with the hash, each atomically.

    Raises:
        ConfigError: a value does not survive fp16.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not (tensor.abs() <= HALF_MAX).all():
            raise ConfigError(f"{key} of {path.name} does not fit fp16: it has NaN or values above {HALF_MAX:.0f}")
    half = {k: (t.half() if t.is_floating_point() else t).cpu().contiguous() for k, t in tensors.items()}
    data = to_bytes(half)
    write_atomic(path, data)
    facts = {**card, "sha256": hashlib.sha256(data).hexdigest()}
    write_atomic(card_path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


def backbone_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model without those of the tunings it carries; merge first to keep what was learned."""
    return {key: tensor.detach() for key, tensor in model.state_dict().items() if f".{CHILD}." not in f".{key}"}


def differences(model: nn.Module, tensors: Mapping[str, Tensor], finite: bool = True) -> str:
    """What keeps tensors from being loaded strictly, with the first names; empty if nothing does."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    found = []
    for what, keys in (("missing", missing), ("unknown", extra), ("of another shape", shapes)):
        if keys:
            found.append(f"{len(keys)} tensors {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})")
    if shapes:
        key = shapes[0]
        found.append(f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}")
    broken = [key for key, tensor in tensors.items() if finite and not torch.isfinite(tensor).all()]
    if broken:
        found.append(f"{len(broken)} tensors with NaN or infinity ({', '.join(broken[:3])})")
    return "; ".join(found)

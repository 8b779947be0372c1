"""Seeded damage to files: to their bytes, to the JSON in them, to the headers and values of safetensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 10**6, 10**30, 1.5, -0.0, 1e300, float("nan"), float("inf"), "", "x", "LoRA", "../../x",
    "/etc/passwd", "{a,b}" * 40, "(.*a)*(a*)*$", "\x1b[31m", "é" * 300, [], [[]], [1, "a", None], {}, {"name": "LoRA"},
    {"name": "Union", "methods": [{"name": "LoRA"}] * 3}, [0] * 1000, {"a": {"b": {"c": {}}}},
)  # fmt: skip


def damage(folder: Path, lot: random.Random) -> str:
    """Change one file of a folder; what was done."""
    path = lot.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    kinds = [_bytes]
    if path.suffix in (".json", ".yaml"):
        kinds += [_json] * 4
    if path.suffix == ".safetensors":
        kinds += [_tensors] * 4
    kind = lot.choice(kinds)
    try:
        return f"{path.name}: {kind(path, lot)}"
    except (ValueError, OverflowError, RuntimeError) as error:  # a value that no such file can hold
        return f"{path.name}: unchanged ({error})"


def _bytes(path: Path, lot: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = lot.randrange(max(1, len(data)))
    what = lot.choice(("cut", "flip", "insert", "double", "empty", "zeros", "length"))
    if what == "cut":
        del data[place:]
    elif what == "flip":
        for _ in range(lot.choice((1, 1, 5, 50))):
            data[lot.randrange(len(data))] ^= 1 << lot.randrange(8)
    elif what == "insert":
        data[place:place] = lot.randbytes(lot.randrange(1, 40))
    elif what == "double":
        data += data[place:]
    elif what == "empty":
        data.clear()
    elif what == "zeros":
        data[place : place + 16] = bytes(len(data[place : place + 16]))
    else:  # of a safetensors header
        data[:8] = lot.choice((0, 2**63, 10**9, len(data))).to_bytes(8, "little")
    path.write_bytes(data)
    return f"{what} at {place}"


def _json(path: Path, lot: random.Random) -> str:
    content = json.loads(path.read_text("utf-8"))
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        places += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    owner, key = lot.choice(places)
    what = lot.choice(("value", "value", "value", "drop", "rename", "deep"))
    if what == "value":
        owner[key] = lot.choice(WRONG)
    elif what == "drop":
        del owner[key]
    elif what == "rename" and isinstance(owner, dict):
        owner[str(lot.choice(WRONG))] = owner.pop(key)
    else:
        for _ in range(lot.choice((3, 2000))):
            owner[key] = [owner[key]]
        text = _dumped(content)
        path.write_text(text, "utf-8")
        return f"{key} deep"
    path.write_text(_dumped(content), "utf-8")
    return f"{what} of {key}: {str(owner.get(key) if isinstance(owner, dict) else '')[:40]}"


def _dumped(content: Any) -> str:
    try:
        return json.dumps(content)
    except RecursionError:
        return "[" * 100_000 + "]" * 100_000


def _tensors(path: Path, lot: random.Random) -> str:
    data = path.read_bytes()
    tensors = load(data)
    size = int.from_bytes(data[:8], "little")
    metadata = dict(json.loads(data[8 : 8 + size]).get("__metadata__") or {})
    key = lot.choice(sorted(tensors))
    tensor = tensors[key]
    what = lot.choice(("drop", "rename", "type", "shape", "values", "extra", "metadata", "swap", "empty", "scalar"))
    if what == "drop":
        del tensors[key]
    elif what == "rename":
        name = lot.choice(
            (key + "x", key[1:], key.replace(".", "_"), "\x1b]0;x\x07", "a." * 500, "", "..", key.upper())
        )
        tensors[name] = tensors.pop(key)
    elif what == "type":
        kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
        tensors[key] = tensor.to(lot.choice(kinds))
    elif what == "shape":
        wide = torch.cat([tensor.flatten(), tensor.flatten()])
        shapes = ((-1,), (1, -1), (-1, 1), (2, -1), (1, 1, 1, -1), (2, 1, 1, 1, 1, -1))
        tensors[key] = wide.reshape(lot.choice(shapes)).clone()
    elif what == "values":
        value = lot.choice((float("nan"), float("inf"), 1e38, -1e30, 0.0, 1e-45))
        tensors[key] = torch.full_like(tensor, value) if tensor.is_floating_point() else tensor * 0
    elif what == "extra":
        name = lot.choice((key + ".extra", "lora_unet_what.lora_up.weight", "bundle_emb.x", "x.alpha", "x.dora_scale"))
        tensors[name] = torch.ones(lot.choice(((1,), (2, 3), ())))
    elif what == "metadata":
        metadata = {str(lot.choice(WRONG)): str(lot.choice(WRONG)), "lora_adapter_metadata": str(lot.choice(WRONG))}
    elif what == "swap":
        other = lot.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other].clone(), tensor.clone()
    elif what == "empty":
        tensors[key] = tensor.flatten()[:0]
    else:
        tensors[key] = tensor.flatten()[:1].reshape(()).clone()
    path.write_bytes(save(tensors, {k: v for k, v in metadata.items() if isinstance(v, str)}))
    return f"{what} of {key}"

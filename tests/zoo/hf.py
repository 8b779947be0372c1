"""Small random models of every type that transformers has, and a script that says which of them run.

python -m tests.zoo.hf [pattern]     # one JSON line a type in $ZOO_CACHE/hf.jsonl; what is there is not run again
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from transformers.models.auto import configuration_auto, modeling_auto

from mmpeft.llm.inputs import example_inputs
from tests.zoo.shrink import small_config

# The most complete class first. Where a type has both, a masked model is what its config describes.
_HEADS = [
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
]
_SECONDS = 60


def _mappings() -> list[dict[str, Any]]:
    tables = {n: getattr(modeling_auto, n) for n in dir(modeling_auto) if n.endswith("MAPPING_NAMES")}
    del tables["CONFIG_MAPPING_NAMES"]
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS] + ["MODEL_MAPPING_NAMES"]
    return [tables[n] for n in [*first, *(n for n in tables if n not in first)]]


def types() -> list[str]:
    """Every model type that an automatic class can create."""
    tables = _mappings()
    return sorted(t for t in configuration_auto.CONFIG_MAPPING_NAMES if any(t in table for table in tables))


def model_class(model_type: str) -> type[nn.Module]:
    """The most complete class of a type: one that takes its config as it is."""
    config = configuration_auto.CONFIG_MAPPING[model_type]
    found: list[type[nn.Module]] = []
    for table in _mappings():
        if model_type in table:
            names = [table[model_type]] if isinstance(table[model_type], str) else table[model_type]
            found += [getattr(transformers, name) for name in names]
    return next((c for c in found if issubclass(config, getattr(c, "config_class", None) or object)), found[0])


def build(model_type: str) -> nn.Module:
    """A small random model; raises with the reason where a type needs files or packages that are not there."""
    config = small_config(configuration_auto.CONFIG_MAPPING[model_type])
    kind = model_class(model_type)
    if kind.forward.__qualname__ == "_forward_unimplemented":
        raise TypeError(f"{kind.__name__} has no forward pass: its parts are called one by one")
    torch.manual_seed(0)
    return kind(config).eval()


def _fake(model: nn.Module, args: Any, kwargs: Any) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        args, kwargs = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, (args, kwargs))
        model(*args, **kwargs)


def _reason(error: BaseException) -> str:
    """The error with the lines of transformers that raised it."""
    steps = traceback.extract_tb(error.__traceback__)
    inside = [step for step in steps if "transformers/models" in step.filename] or steps
    where = " ".join(f"{Path(step.filename).name}:{step.lineno}" for step in inside[-3:])
    return f"{type(error).__name__}: {str(error)[:300]} @{where}"


def report(model_type: str) -> dict[str, Any]:
    """What one type does: built, real forward, fake forward."""
    found: dict[str, Any] = {"type": model_type}
    began = time.perf_counter()
    try:
        model = build(model_type)
        found["class"] = type(model).__name__
        found["parameters"] = sum(p.numel() for p in model.parameters())
        found["built"] = True
    except Exception as error:
        return {**found, "built": _reason(error)}
    found["seconds_build"] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    try:
        inputs = example_inputs(model)
        assert inputs is not None, "no transformers model"
        found["inputs"] = sorted(inputs[1])
        torch.manual_seed(0)
        with torch.no_grad():
            model(*inputs[0], **inputs[1])
        found["real"] = True
    except Exception as error:
        return {**found, "real": _reason(error)}
    found["seconds_real"] = round(time.perf_counter() - began, 2)
    try:
        _fake(model, *inputs)
        found["fake"] = True
    except Exception as error:
        found["fake"] = _reason(error)
    return found


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    while (model_type := pipe.recv()) is not None:
        pipe.send(report(model_type))


class _Worker:
    """A process that is replaced when a type takes too long or ends it."""

    def __init__(self) -> None:
        self.process: Any = None

    def run(self, model_type: str) -> dict[str, Any]:
        if self.process is None:
            context = get_context("fork")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_work, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.pipe.send(model_type)
        try:
            if self.pipe.poll(_SECONDS):
                found: dict[str, Any] = self.pipe.recv()
                return found
            reason = f"no answer in {_SECONDS} s"
        except EOFError:
            self.process.join()
            reason = f"the process ended with {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.process = None
        return {"type": model_type, "built": reason}


def main(pattern: str = "*") -> None:
    """Run every type whose name matches and is not in the cache."""
    cache = Path(os.environ.get("ZOO_CACHE", Path(tempfile.gettempdir()) / "mmpeft_zoo")) / "hf.jsonl"
    cache.parent.mkdir(parents=True, exist_ok=True)
    lines = cache.read_text().splitlines() if cache.exists() else []
    known = {one["type"]: one for one in map(json.loads, lines)}
    asked = [t for t in types() if fnmatch.fnmatch(t, pattern)]
    worker = _Worker()
    with cache.open("a") as out:
        for model_type in asked:
            if model_type not in known:
                known[model_type] = worker.run(model_type)
                print(json.dumps(known[model_type]), file=out, flush=True)
            one = known[model_type]
            print(
                " | ".join(f"{k}={one[k]}" for k in ("type", "built", "real", "fake", "seconds_real") if k in one),
                flush=True,
            )
    count = Counter(k for t in asked for k in ("built", "real", "fake") if known[t].get(k) is True)
    print(f"{len(asked)} types: {count['built']} built, {count['real']} run, {count['fake']} run on fake tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Every format's reader on damaged files; `make fuzz` does ten times as many."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import mmpeft
from mmpeft.bank import Bank, LinearHead
from mmpeft.diffusion.style.words import read_words
from mmpeft.errors import MMPEFTError
from mmpeft.formats.exchange import export, inspect
from mmpeft.run.stranger import read_config
from mmpeft.sites import known
from mmpeft.tasks.checkpoint import AtomicCheckpointIO
from tests.fuzz.mutations import damage
from tests.unit.toy import Toy

TIMES = int(os.environ.get("MMPEFT_MUTATIONS", "200"))
SEED = int(os.environ.get("MMPEFT_FUZZ_SEED", "0"))
MOST_SECONDS, MOST_MIB = 10.0, 400
METHOD = mmpeft.LoRA(rank=2)
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def tuned(method: Any = METHOD) -> mmpeft.Tuning:
    tuning = mmpeft.attach(Toy(), method)
    with torch.no_grad():
        for number, parameter in enumerate(tuning.parameters()):
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter) * (1 + number % 3))
    return tuning


def native(folder: Path) -> None:
    tuned(METHOD + mmpeft.IA3() + mmpeft.BitFit()).save(folder)


def bank(folder: Path) -> None:
    own = Bank(Toy(), extract=lambda model, x: x.mean(1))
    own.add_task("a", METHOD, head=LinearHead(8, range(3)))
    own.add_task("b", mmpeft.BitFit())
    own["b"].meta["note"] = "x"
    own.save(folder)


def plan(folder: Path) -> None:
    loader = [(X, torch.tensor([0, 1]))]
    chosen = mmpeft.allocate(Toy(), loader, "25%", mmpeft.LoRA(rank=1, at="mlp.*"))
    chosen.save(folder / "plan.json")


def peft(method: Any) -> Callable[[Path], None]:
    return lambda folder: void(tuned(method).export(folder, verify=False))


def single(form: Any, method: Any = METHOD) -> Callable[[Path], None]:
    return lambda folder: void(export(tuned(method), folder / "lora.safetensors", form, verify=False, prefix="unet"))


def void(_: object) -> None:
    return None


def load_bank(model: nn.Module, folder: Path) -> Any:
    return Bank.load(model, folder)


def load_plan(model: nn.Module, folder: Path) -> Any:
    return mmpeft.attach(model, mmpeft.methods.Plan(str(folder / "plan.json")))


def checkpoint(folder: Path) -> None:
    facts = {"state_dict": {"a": torch.ones(3), "b": torch.arange(4.0)}, "epoch": 1, "classes": ["x", "y"]}
    AtomicCheckpointIO().save_checkpoint(facts, folder / "last.ckpt")


def load_checkpoint(model: nn.Module, folder: Path) -> Any:
    return AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt")


def word(folder: Path) -> None:
    save_file({"sun": torch.ones(2, 8)}, folder / "sun.safetensors", {"word": "sun"})


def load_word(model: nn.Module, folder: Path) -> Any:
    return read_words(folder, {"text_encoder": "clip_l"})


def config(folder: Path) -> None:
    found = next(Path(__file__).parents[1].glob("compat/former/kept/*/config.yaml"))
    (folder / "config.json").write_text(json.dumps(yaml.safe_load(found.read_text())))  # which is YAML as well


def load_config(model: nn.Module, folder: Path) -> Any:
    return read_config(folder / "config.json")


def foreign(model: nn.Module, folder: Path) -> Any:
    inspect(folder, model)
    return mmpeft.load_foreign(model, folder)


FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[nn.Module, Path], Any]]] = {
    "adapter": (native, mmpeft.load),
    "bank": (bank, load_bank),
    "plan": (plan, load_plan),
    "PEFT LoRA": (peft(mmpeft.LoRA(rank=2, at="attn.q|mlp.*", rank_pattern={"mlp.up": 3})), foreign),
    "PEFT DoRA": (peft(mmpeft.DoRA(rank=2)), foreign),
    "PEFT IA3": (peft(mmpeft.IA3()), foreign),
    "PEFT LoKr": (peft(mmpeft.KronA()), foreign),
    "diffusers": (single("diffusers"), foreign),
    "checkpoint": (checkpoint, load_checkpoint),
    "word": (word, load_word),
    "configuration of a run": (config, load_config),
    "kohya": (single("kohya", mmpeft.DoRA(rank=2)), foreign),
}


def state(model: nn.Module) -> str:
    """Everything a failed load may not change."""
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.requires_grad}".encode())
        found.update(tensor.detach().numpy().tobytes())
    modules = [(name, type(m).__name__, sorted(m.__dict__), m.training) for name, m in model.named_modules()]
    return found.hexdigest() + str(modules)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    write, load = FORMATS[name]
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    whole.mkdir()
    write(whole)
    load(Toy(), whole)  # what is not damaged loads
    lot = random.Random(f"{name}{SEED}")
    model, outcomes, faults = Toy(), {"refused": 0, "loaded": 0}, list[str]()
    before, sites = state(model), dict(known._FOUND)
    times = TIMES // 10 if load is load_config else TIMES  # PyYAML takes its time
    for number in range(times):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        done = damage(copy, lot)
        if name in ("adapter", "bank") and number % 4:  # what follows the check of the digest is tried as well
            sign(copy)
        start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load(model, copy)
            outcomes["loaded"] += 1
            model = Toy()
        except MMPEFTError as error:
            outcomes["refused"] += 1
            if not str(error) or "\x1b" in str(error) or len(str(error)) > 25_000:
                faults.append(f"{number} {done}: the message {str(error)[:200]!r}")
            if state(model) != before:
                faults.append(f"{number} {done}: the model is changed by {error}")
                model = Toy()
        except BaseException as error:
            faults.append(f"{number} {done}: {type(error).__name__}: {str(error)[:200]}")
            model = Toy()
        if time.process_time() - start > MOST_SECONDS:
            faults.append(f"{number} {done}: {time.process_time() - start:.1f} s")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak > MOST_MIB * 1024:
            faults.append(f"{number} {done}: memory")
    assert known._FOUND.keys() == sites.keys()
    assert not faults, "\n".join([f"{len(faults)} of {times}", *faults[:12]])
    assert outcomes["refused"] > times / 8, outcomes


def sign(folder: Path) -> None:
    """Have the manifest say the digests of the files that are there, as whoever makes hostile files would."""
    for file in folder.glob("*.json"):
        try:
            content = json.loads(file.read_text("utf-8"))
            for entry in content.get("entries", [content.get("tensors")]):
                entry["sha256"] = hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
            file.write_text(json.dumps(content), "utf-8")
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            continue

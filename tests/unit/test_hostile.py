"""Small files that would cost much: refused before memory or time is spent."""

from __future__ import annotations

import base64
import hashlib
import json
import resource
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft.bank import Bank, LinearHead
from mmpeft.errors import AdapterFileError, ConfigError, MMPEFTError
from mmpeft.formats.exchange import inspect
from mmpeft.formats.patterns import matches, value_for
from mmpeft.methods.shared.plan_file import unpack
from mmpeft.sites import sites
from mmpeft.sites.selector import select
from tests.unit.toy import Toy

SLOW = "(a|a)+[bc]"


@pytest.fixture(autouse=True)
def cheap() -> Iterator[None]:
    """Each case takes at most ten seconds, once what it needs is imported, and 200 MiB."""
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024


def changed(folder: Path, *keys: Any, value: object) -> None:
    """A manifest with one field changed."""
    (path,) = folder.glob("*.json")
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("rank", [5_000_000, 10**12, 10**30])
def test_a_rank_beyond_the_file(tmp_path: Path, rank: int) -> None:
    mmpeft.attach(Toy(), mmpeft.LoRA(rank=2)).save(tmp_path)
    changed(tmp_path, "method", "rank", value=rank)
    model = Toy()
    with pytest.raises(AdapterFileError):
        mmpeft.load(model, tmp_path)
    assert type(model) is Toy


@pytest.mark.parametrize("where", ["method", "head"])
def test_a_bank_beyond_its_file(tmp_path: Path, where: str) -> None:
    bank = Bank(Toy(), extract=lambda model, x: x.mean(1))
    bank.add_task("a", mmpeft.LoRA(rank=2), head=LinearHead(8, range(3)))
    bank.save(tmp_path)
    field = "rank" if where == "method" else next(k for k in bank["a"].head.spec() if k != "kind")  # type: ignore[union-attr]  # it has a head
    changed(tmp_path, "entries", 0, where, field, value=50_000_000)
    with pytest.raises(AdapterFileError):
        Bank.load(Toy(), tmp_path)


def test_indices_that_unpack_without_end() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(2**28), 9)).decode()
    with pytest.raises(AdapterFileError, match="indices"):
        unpack(bomb, 100, 1000)
    with pytest.raises(AdapterFileError, match="indices"):
        unpack(bomb, 2**40, 1000)


@pytest.mark.parametrize(
    "at",
    [
        "{a,b}" * 40,
        "{a,{b,c}}" * 30,
        "{" * 5000 + "a" + "}" * 5000,
        "|".join(f"mlp.up & path=*{i}*" for i in range(30_000)),
    ],
    ids=["braces", "nested", "deep", "many"],
)
def test_selectors_multiply_no_further_than_this(at: str) -> None:
    with pytest.raises(ConfigError, match=r"braces|alternatives"):
        select(sites(Toy()), at)


def test_selectors_as_people_write_them() -> None:
    assert len(select(sites(Toy()), "{attn.q,mlp.{up,down}}")) == 6


def test_patterns_that_never_end(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="takes more than"):
        matches(SLOW, "a" * 200)
    assert value_for({"x": 1, "q": 2}, "blocks.0.q", 3) == 2
    assert value_for({"^blocks.0.q": 1}, "blocks.0.q", 3) == 1
    assert value_for({"q": 1}, "blocks.0.qq", 3) == 3
    folder = mmpeft.attach(Toy(), mmpeft.LoRA(rank=2)).export(tmp_path / "peft", verify=False).path
    path = folder / "adapter_config.json"
    for field, value in (("target_modules", SLOW), ("rank_pattern", {SLOW: 2}), ("rank_pattern", {"(": 2})):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, field: value}))
        tensors = load_file(folder / "adapter_model.safetensors")
        long = {key.replace("blocks", "a" * 200): tensor for key, tensor in tensors.items()}
        save_file(long, folder / "adapter_model.safetensors")
        with pytest.raises(MMPEFTError):
            mmpeft.load_foreign(Toy(), folder)
        path.write_text(json.dumps(content))
        save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/secret.safetensors", "sub/x.safetensors", "..", ""])
def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = mmpeft.attach(Toy(), mmpeft.LoRA(rank=2)).save(tmp_path / "adapter")
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    changed(folder, "tensors", "file", value=name)
    for reader in (lambda: mmpeft.load(Toy(), folder), lambda: inspect(folder)):
        with pytest.raises(AdapterFileError, match="beside it"):
            reader()


def test_a_bank_that_was_given_does_not_remove_what_it_names(tmp_path: Path) -> None:
    bank = Bank(Toy())
    bank.add_task("a", mmpeft.LoRA(rank=2))
    folder = bank.save(tmp_path / "bank")
    (tmp_path / "precious.safetensors").touch()
    (folder / "mine.safetensors").touch()
    for file in ("../precious.safetensors", str(tmp_path / "precious.safetensors"), "mine.safetensors"):
        changed(folder, "entries", 0, "file", value=file)
        bank.save(folder)
        assert (tmp_path / "precious.safetensors").exists()


def test_a_file_larger_than_its_model_accounts_for(tmp_path: Path) -> None:
    folder = mmpeft.attach(Toy(), mmpeft.LoRA(rank=2)).save(tmp_path / "adapter")
    (file,) = folder.glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.truncate(2**36)  # sparse: it takes no room on the disk
    with pytest.raises(AdapterFileError, match="68,719,476,736 bytes"):
        mmpeft.load(Toy(), folder)


def test_a_damaged_anatomy_is_forgotten(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 5))

    x = torch.randn(2, 4)
    mmpeft.attach(model(), mmpeft.LoRA(rank=2, at="proj"), example=x).save(tmp_path)
    from mmpeft.sites import known

    known._FOUND.clear()
    content = json.loads((tmp_path / "adapter.json").read_text())
    content["anatomy"][0]["role"] = "mlp.down"
    content["base"] |= {"fingerprint": "0" * 16, "layout": "0" * 16}
    (tmp_path / "adapter.json").write_text(json.dumps(content))
    fresh = model()
    with pytest.raises(AdapterFileError):
        mmpeft.load(fresh, tmp_path)
    assert not known._FOUND
    assert hashlib.sha256(str(fresh).encode()).hexdigest() == hashlib.sha256(str(model()).encode()).hexdigest()

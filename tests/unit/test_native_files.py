"""Adapter folders: round trips, and what every kind of bad file gets."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft import files
from mmpeft.errors import AdapterFileError, ConfigError, MMPEFTError, StateError
from mmpeft.methods.spec import from_spec, to_spec
from tests.unit.toy import Toy


def _saved(folder: Path, seed: int = 0, **kwargs: int) -> tuple[nn.Module, mmpeft.Tuning]:
    model = Toy(seed=seed, **kwargs)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.q|mlp.up"))
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.1)
    tuning.save(folder)
    return model, tuning


def _tensors(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_round_trip_in_another_process_like_model(tmp_path: Path) -> None:
    model, _ = _saved(tmp_path)
    other = Toy()
    tuning = mmpeft.load(other, tmp_path, name="style")
    x = torch.randn(2, 3, 8)
    assert torch.equal(other(x), model(x))
    assert tuning.name == "style"
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    assert manifest["method"]["name"] == "LoRA"
    assert manifest["libraries"]["torch"] == torch.__version__.split("+")[0] or manifest["libraries"]["torch"]


def test_saving_again_leaves_one_adapter(tmp_path: Path) -> None:
    _, tuning = _saved(tmp_path)
    first = _tensors(tmp_path)
    with torch.no_grad():
        next(tuning.parameters()).add_(1)
    tuning.save(tmp_path)
    assert _tensors(tmp_path) != first


def test_a_base_cast_to_bf16_is_the_same_base(tmp_path: Path) -> None:
    _saved(tmp_path)
    tuning = mmpeft.load(Toy().bfloat16(), tmp_path)
    assert {p.dtype for p in tuning.parameters()} == {torch.float32}


def test_another_base_is_refused_and_both_are_named(tmp_path: Path) -> None:
    _saved(tmp_path)
    expected = json.loads((tmp_path / "adapter.json").read_text())["base"]["fingerprint"]
    other = Toy(seed=1)
    with pytest.raises(
        AdapterFileError, match=rf"another base: expected Toy {expected}, this model is Toy [0-9a-f]{{16}}"
    ):
        mmpeft.load(other, tmp_path)
    assert not mmpeft.tunings(other)
    assert all(p.requires_grad for p in other.parameters())
    assert mmpeft.load(other, tmp_path, check_base=False)


def test_another_shape_names_the_tensor(tmp_path: Path) -> None:
    _saved(tmp_path)
    with pytest.raises(AdapterFileError, match=r"expected shape|another base"):
        mmpeft.load(Toy(width=16), tmp_path, check_base=False)


@pytest.mark.parametrize("keep", [0, 20, -1], ids=["empty", "header", "last byte"])
def test_truncated(tmp_path: Path, keep: int) -> None:
    _saved(tmp_path)
    path = _tensors(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterFileError, match="truncated or was changed"):
        mmpeft.load(Toy(), tmp_path)


def test_one_flipped_bit(tmp_path: Path) -> None:
    _saved(tmp_path)
    path = _tensors(tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match="expected sha256"):
        mmpeft.load(Toy(), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "only a part"),
        (b"\x80\x04", "not a manifest"),
        (b'{"format": "other", "version": 1}', "expected format 'mmpeft'"),
        (b'{"format": "mmpeft", "version": 99}', "update mmpeft"),
        (b'{"format": "mmpeft", "version": 1}', "only a part"),
    ],
)
def test_foreign_manifest(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "adapter.json").write_bytes(content)
    with pytest.raises(AdapterFileError, match=message):
        mmpeft.load(Toy(), tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "boom"),))

    (tmp_path / "adapter.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterFileError, match="pickled files are never read"):
        mmpeft.load(Toy(), tmp_path)
    _saved(tmp_path)
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    for name in ("adapter.bin", "../adapter.safetensors"):
        manifest["tensors"]["file"] = name
        (tmp_path / "adapter.json").write_text(json.dumps(manifest))
        with pytest.raises(AdapterFileError, match=r"only a \.safetensors file beside it"):
            mmpeft.load(Toy(), tmp_path)
    assert not (tmp_path / "boom").exists()


def test_missing_tensors_file_and_missing_folder(tmp_path: Path) -> None:
    _saved(tmp_path)
    _tensors(tmp_path).unlink()
    with pytest.raises(AdapterFileError, match="copied in part"):
        mmpeft.load(Toy(), tmp_path)
    with pytest.raises(AdapterFileError, match="does not exist"):
        mmpeft.load(Toy(), tmp_path / "nowhere")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="Hugging Face PEFT folder"):
        mmpeft.load(Toy(), tmp_path / "hf")


def test_a_diverged_tuning_is_not_saved_over_a_good_one(tmp_path: Path) -> None:
    _, tuning = _saved(tmp_path)
    good = tuning.state_dict()
    with torch.no_grad():
        next(tuning.parameters())[0, 0] = float("nan")
    with pytest.raises(StateError, match=r"A holds NaN or infinity: training has diverged.*stays"):
        tuning.save(tmp_path)
    found = mmpeft.load(Toy(), tmp_path).state_dict()
    assert not any(torch.isnan(tensor).any() for tensor in found.values())
    assert found.keys() == good.keys()


def test_unknown_method_or_field(tmp_path: Path) -> None:
    _saved(tmp_path)
    path = tmp_path / "adapter.json"
    manifest = json.loads(path.read_text())
    manifest["method"]["name"] = "LoRa"
    path.write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError, match="Did you mean 'LoRA'"):
        mmpeft.load(Toy(), tmp_path)
    manifest["method"] = {"name": "LoRA", "rang": 3}
    path.write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError, match=r"no field 'rang'.*Did you mean 'rank'"):
        mmpeft.load(Toy(), tmp_path)


def test_disk_full_leaves_the_old_adapter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tuning = _saved(tmp_path)
    x = torch.randn(2, 3, 8)
    old = model(x)
    with torch.no_grad():
        next(tuning.parameters()).add_(1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MMPEFTError, match=r"No space left.*before is whole"):
        tuning.save(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    other = Toy()
    mmpeft.load(other, tmp_path)
    assert torch.equal(other(x), old)


def test_merged_tunings_are_not_saved(tmp_path: Path) -> None:
    _, tuning = _saved(tmp_path)
    tuning.merge()
    with pytest.raises(ConfigError, match="unmerge"):
        tuning.save(tmp_path)


@pytest.mark.parametrize(
    "method",
    [
        mmpeft.LoRA(rank=4, rank_pattern={"mlp.up": 2}) + mmpeft.BitFit(at="attn.q"),
        mmpeft.Houlsby().where("depth>=1"),
        mmpeft.VPT(tokens=3, deep=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_methods_survive_json(method: mmpeft.Method) -> None:
    assert from_spec(json.loads(json.dumps(to_spec(method)))) == method


def test_predicates_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="selector string"):
        to_spec(mmpeft.LoRA(at=lambda site: True))

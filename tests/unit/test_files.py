"""Folders under several processes, writers that are killed, and places that cannot be written."""

from __future__ import annotations

import errno
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mmpeft
from mmpeft import files
from mmpeft.bank import Bank
from mmpeft.errors import AdapterFileError, FileError, MMPEFTError, shown
from mmpeft.formats.content import read_json, read_tensors
from tests.support.killing import FORK
from tests.unit.toy import Toy

SAVES, KILLS = int(os.environ.get("MMPEFT_SAVES", "25")), int(os.environ.get("MMPEFT_KILLS", "10"))
"""Of each writer, and of a writer; 200 by `make faults`."""


def an_adapter(folder: Path, value: float) -> Callable[[], object]:
    tuning = mmpeft.attach(Toy(), mmpeft.LoRA(rank=2))
    fill(tuning, value)
    return lambda: tuning.save(folder)


def a_bank(folder: Path, value: float) -> Callable[[], object]:
    bank = Bank(Toy())
    for name in ("a", "b"):
        bank.add_task(name, mmpeft.LoRA(rank=2))
        fill(bank.tuning(name), value)
    return lambda: bank.save(folder)


def a_peft_folder(folder: Path, value: float) -> Callable[[], object]:
    tuning = mmpeft.attach(Toy(), mmpeft.LoRA(rank=int(value) + 1))
    fill(tuning, value)
    return lambda: tuning.export(folder, verify=False)


def fill(tuning: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.fill_(value)


def values(tensors: dict[str, torch.Tensor]) -> set[float]:
    return {float(value) for tensor in tensors.values() for value in tensor.unique()}


def read_adapter(folder: Path) -> set[float]:
    return values(mmpeft.load(Toy(), folder).state_dict())


def read_bank(folder: Path) -> set[float]:
    bank = Bank.load(Toy(), folder)
    return set.union(*(values(bank.tuning(name).state_dict()) for name in bank.ids))


KINDS = {"adapter": (an_adapter, read_adapter), "bank": (a_bank, read_bank)}


def save_often(make: Any, folder: Path, value: float, times: int) -> None:
    torch.set_num_threads(1)
    save = make(folder, value)
    for _ in range(times):
        save()


@pytest.mark.parametrize("kind", KINDS)
def test_two_writers_and_a_reader(tmp_path: Path, kind: str) -> None:
    make, read = KINDS[kind]
    make(tmp_path, 1.0)()
    writers = [FORK.Process(target=save_often, args=(make, tmp_path, value, SAVES)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    found, reads = set[float](), 0
    while any(writer.is_alive() for writer in writers):
        now = read(tmp_path)
        assert len(now) == 1  # of one writer
        found |= now
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert reads
    assert read(tmp_path) <= {1.0, 2.0}
    tidy(tmp_path, kind)


def test_two_exports_into_one_folder_are_one_of_both(tmp_path: Path) -> None:
    writers = [FORK.Process(target=save_often, args=(a_peft_folder, tmp_path, value, SAVES)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    mmpeft.load_foreign(Toy(), tmp_path)  # rank and tensors of one writer
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_killed_writers_leave_nothing(tmp_path: Path, kind: str) -> None:
    make, read = KINDS[kind]
    make(tmp_path, 1.0)()
    for number in range(KILLS):
        writer = FORK.Process(target=save_often, args=(make, tmp_path, float(number), 10_000))
        writer.start()
        time.sleep(0.05 + 0.05 * number / KILLS)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        assert len(read(tmp_path)) == 1  # whole after every kill
    files._swept.clear()  # as in a process of its own
    make(tmp_path, 3.0)()
    assert read(tmp_path) == {3.0}
    tidy(tmp_path, kind)


def tidy(folder: Path, kind: str) -> None:
    """Nothing of another state, and nothing unfinished."""
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == {"adapter": 2, "bank": 3}[kind], names
    assert not [name for name in names if name.startswith(".")]


def test_what_is_unfinished_and_dead_is_swept(tmp_path: Path) -> None:
    dead = tmp_path / f".0123{files.UNFINISHED}"
    dead.write_bytes(b"half")
    folder = tmp_path / f".4567{files.UNFINISHED}"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / ".others.tmp").touch()
    with files.scratch_folder(tmp_path / "model") as live:
        (live / "part").touch()
        files.sweep(tmp_path)
        assert (live / "part").exists()  # somebody is writing it
        assert not dead.exists()
        assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".others.tmp"]


def test_another_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"somebody's")
    an_adapter(tmp_path, 1.0)()
    a_bank(tmp_path, 2.0)()
    a_bank(tmp_path, 3.0)()
    assert (tmp_path / "weights.safetensors").read_bytes() == b"somebody's"
    assert read_adapter(tmp_path) == {1.0}
    assert read_bank(tmp_path) == {3.0}


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "file", b"x")
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_what_the_system_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    save = an_adapter(tmp_path / "adapter", 1.0)
    save()

    def fails(*args: object) -> None:
        raise OSError(error, os.strerror(error))

    for name in ("fsync", "replace", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(FileError, match=f"cannot write.*{os.strerror(error)}"):
                save()
    assert read_adapter(tmp_path / "adapter") == {1.0}
    tidy(tmp_path / "adapter", "adapter")


@pytest.mark.parametrize("place", ["a file/adapter", "x" * 300, "nul\0", "plain"])
def test_places_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "plain").touch()
    for save in (an_adapter(tmp_path / place, 1.0), a_bank(tmp_path / place, 1.0), a_peft_folder(tmp_path / place, 1)):
        with pytest.raises(FileError):
            save()


@pytest.mark.parametrize("name", ["adapter.json", "bank.json", "adapter_config.json", "x.safetensors", "plan.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "secret"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("{}")
        path.chmod(0)
    readers: dict[str, Callable[[], object]] = {
        "adapter.json": lambda: mmpeft.load(Toy(), tmp_path),
        "bank.json": lambda: Bank.load(Toy(), tmp_path),
        "adapter_config.json": lambda: mmpeft.load_foreign(Toy(), tmp_path),
        "x.safetensors": lambda: mmpeft.load_foreign(Toy(), path),
        "plan.json": lambda: mmpeft.methods.Plan(str(path)),
    }
    with pytest.raises(AdapterFileError, match=name.replace(".", r"\.")):
        readers[name]()


def test_names_do_not_reach_the_terminal_raw() -> None:
    message = str(MMPEFTError("layer \x1b[2Jred\x07 \u202egnp.exe " + "x" * 5000 + "\udcff"))
    assert "\x1b" not in message
    assert r"\x1b[2Jred\x07 \u202egnp.exe" in message
    assert r"\udcff" in message or "…" in message
    assert len(message) < 500
    assert shown("two\nlines") == "two\nlines"


def test_readers_see_errors_of_files_that_nobody_changes(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{")
    calls = []

    def read() -> None:
        calls.append(1)
        read_json(tmp_path / "adapter.json")

    with pytest.raises(AdapterFileError):
        files.read_steadily(read, tmp_path / "adapter.json")
    assert len(calls) == 1
    with pytest.raises(AdapterFileError):
        read_tensors(tmp_path / "none.safetensors")


def test_reading_only(tmp_path: Path) -> None:
    with files.reading_only("classify"), pytest.raises(FileError, match="classify may not write"):
        files.write_atomic(tmp_path / "x", b"")
    files.write_atomic(tmp_path / "x", b"")
    assert files.may_write()

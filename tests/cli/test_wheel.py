"""The wheel, installed away from the clone, does what README says; what is not installed is named with its extra."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    copy = folder / "clone"
    for name in known.decode().split("\0"):
        if name and not name.startswith(("tests/", "docs/", "benchmarks/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).hardlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def installed(wheel: Path, extras: bool) -> Path:
    """The `mmpeft` of a new environment with that wheel, and the libraries of this one: all, or the core's alone."""
    folder = wheel.parent / ("all" if extras else "core")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True, capture_output=True)
    python = folder / "bin" / "python"
    subprocess.run([*uv, "pip", "install", "-q", "--no-deps", "--python", str(python), str(wheel)], check=True)
    (site,) = folder.glob("lib/*/site-packages")
    if extras:  # of a folder on the path no .pth is read: the editable install stays unseen
        (site / "libraries.pth").write_text(f"{SITE}\n")
    else:
        for top in core_libraries(needed_by(wheel)):
            (site / top).exists() or (site / top).symlink_to(SITE / top)
    return folder / "bin" / "mmpeft"


def needed_by(wheel: Path) -> list[str]:
    """The requirements that a wheel states."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []


def core_libraries(requirements: list[str]) -> set[str]:
    """Files and folders of site-packages that the dependencies without any extra own, and those of them in turn."""
    waiting, seen, tops = list(requirements), set[str](), set[str]()
    while waiting:
        needed, _, condition = waiting.pop().partition(";")
        extra = re.search(r"extra == .([\w-]+)", condition)
        name = re.split(r"[\s<>=!~\[(]", needed.strip(), maxsplit=1)[0].lower()
        if (extra and extra[1] != "signatures") or name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except ModuleNotFoundError:  # of another platform
            continue
        waiting += found.requires or ()
        tops |= {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
    return tops


def run(command: Path, *arguments: str, fails: bool = False) -> str:
    done = subprocess.run([str(command), *arguments], cwd=command.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == (2 if fails else 0), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def test_with_all_extras(wheel: Path) -> None:
    mmpeft = installed(wheel, extras=True)
    assert len(run(mmpeft, "configs").splitlines()) == len(list((ROOT / "configs").rglob("*.yaml")))
    said = run(mmpeft, "fit", "-c", "vision/emoji", "-c", "method/lora", "--trainer.max_steps=1", "--data.batch_size=8")
    assert "adapter" in said
    assert (mmpeft.parent / "runs" / "EmojiData-LoRA" / "version_0" / "adapter" / "adapter.json").is_file()


def test_without_extras(wheel: Path) -> None:
    mmpeft = installed(wheel, extras=False)
    for arguments, extra in (
        ("sample --adapter a --prompt b", "diffusion"),
        ("fit -c vision/demo --method LoRA", "vision"),
        ("classify --image a.png --classes a,b", "vla"),
        ("sites timm:vit_tiny_patch16_224", "vision"),
    ):
        assert f"pip install 'mmpeft[{extra}]'" in run(mmpeft, *arguments.split(), fails=True)

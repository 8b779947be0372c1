"""The configurations that ship with the package: found by name, listed, shown, and written out to be edited."""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from mmpeft.errors import ConfigError, nearest
from mmpeft.files import write_atomic

SUFFIXES = (".yaml", ".yml", ".json")
_COMMAND = re.compile(r"^#\s+(mmpeft .*)$")
_NAME = re.compile(r"^\w+/\w+$")


@cache
def shipped() -> dict[str, Path]:
    """Every shipped configuration by name: `{"vision/demo": …/configs/vision/demo.yaml}`."""
    folder = Path(str(files("mmpeft.configs")))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def find_config(name: str) -> Path:
    """The file that `-c` names: a path, or a shipped configuration such as `vision/demo`.

    A path that is there comes first. `configs/vision/demo.yaml` is the shipped one where there is no such file.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    short = name.removeprefix("configs/")
    short = short.removesuffix(path.suffix) if path.suffix in SUFFIXES else short
    if short in known:
        return known[short]
    what = "is a folder" if path.is_dir() else "is neither a file nor a shipped configuration"
    raise ConfigError(f"{name} {what}.{_hint(short)} `mmpeft configs` lists those that ship")


def _hint(short: str) -> str:
    """The nearest name, or the names in full where only the last part was given."""
    whole = [name for name in shipped() if name.rpartition("/")[2] == short]
    return f" Did you mean {' or '.join(map(repr, whole))}?" if whole else nearest(short, shipped())


def summary(path: Path) -> str:
    """The first sentence of a configuration's comment."""
    said: list[str] = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#") or _COMMAND.match(line):
            break
        said.append(line.lstrip("# ").strip())
    return re.split(r"(?<=[\w)])\. ", " ".join(said) + " ")[0].strip().rstrip(".")


def commands_in(text: str) -> list[str]:
    """The commands that the comment of a configuration names."""
    return [match[1] for line in text.splitlines() if (match := _COMMAND.match(line))]


def configs(argv: Sequence[str] | None = None) -> int:
    """`mmpeft configs [PATTERN]` and `mmpeft configs show NAME`; `argv` starts with the sub-command."""
    parser = argparse.ArgumentParser(
        "mmpeft configs",
        usage="mmpeft configs [PATTERN …]\n       mmpeft configs show NAME",
        description="List the configurations that ship, or print one. `-c NAME` uses it, `mmpeft init NAME` copies it.",
    )
    parser.add_argument("pattern", nargs="*", help="wildcards, such as 'vision/*' or '*lora*'; default: all")
    words = parser.parse_args(list(sys.argv[1:] if argv is None else argv)[1:]).pattern
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise ConfigError(f"mmpeft configs show takes one name, got {len(words) - 1}")
        print(find_config(words[1]).read_text("utf-8"), end="")
        return 0
    known = shipped()
    found = [name for name in known if not words or any(_fits(name, word) for word in words)]
    if not found:
        raise ConfigError(f"no shipped configuration matches {' '.join(words)!r}.{_hint(words[0].strip('*'))}")
    width = max(map(len, found))
    for name in found:
        print(f"{name:<{width}}  {summary(known[name])}")
    return 0


def _fits(name: str, pattern: str) -> bool:
    """A wildcard over the whole name; a word alone is sought anywhere in it."""
    return fnmatch.fnmatchcase(name, pattern if set(pattern) & set("*?[") else f"*{pattern}*")


def init(argv: Sequence[str] | None = None) -> int:
    """`mmpeft init TASK`: write a shipped configuration to a file to be edited; `argv` starts with the sub-command."""
    parser = argparse.ArgumentParser(
        "mmpeft init", description="Write a shipped configuration to a file of yours, to be edited."
    )
    parser.add_argument("task", help="a shipped configuration (`mmpeft configs`), or a task's class: ImageClassifier")
    parser.add_argument("--out", type=Path, help="the file to write; default: the configuration's own name, here")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv)[1:])
    source = _of_task(args.task)
    out: Path = args.out or Path(source.name)
    if out.is_dir():
        out = out / source.name
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(SUFFIXES)}")
    if out.exists():
        raise ConfigError(f"{out} is there already: give another name with --out")
    name = next(name for name, path in shipped().items() if path == source)
    text = re.sub(rf"(?<=-c ){re.escape(name)}(?=\s|$)", out.as_posix(), source.read_text("utf-8"))
    write_atomic(out, text.encode())
    print(f"wrote {out}", *commands_in(text), sep="\n  ")
    return 0


def _of_task(name: str) -> Path:
    """The configuration of a name, or the only one that trains a task of that class.

    Raises:
        ConfigError: there is none, or several.
    """
    if _NAME.match(name) or name.endswith(SUFFIXES):
        return find_config(name)
    known = shipped()
    alike = [one for one in known if one.rpartition("/")[2] == name]
    alike = alike or [
        one for one, path in known.items() if re.search(rf"^  class_path: {re.escape(name)}$", path.read_text(), re.M)
    ]
    if len(alike) == 1:
        return known[alike[0]]
    if alike:
        lines = "\n".join(f"  mmpeft init {one}  # {summary(known[one])}" for one in alike)
        raise ConfigError(f"{len(alike)} configurations are of {name}; choose one:\n{lines}")
    return find_config(name)

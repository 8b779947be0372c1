"""Every code block of README and docs runs: a page is one program; commands are parsed by their own parsers or run."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mmpeft.bench import compare
from mmpeft.cli import main
from mmpeft.methods import METHODS
from mmpeft.sites import notes
from tests.docs.blocks import LANGUAGES, REASONS, ROOT, Block, blocks, pages

RUNS = {"configs", "init", "methods", "models", "data", "completion"}
"""Commands that are run wherever they stand: they are quick and need nothing."""
TRAINS = {"fit", "resume", "validate", "test", "predict", "compare", "continual"}
LIGHTNING = {"fit", "validate", "test", "predict"}
PROGRAM = [page for page in pages() if any(block.language in ("python", "bash") for block in blocks(page))]


OWN = "docs_"
"""How modules are called that pages are run as."""


class Parsed(BaseException):
    """A command's options were read; nothing was done with them."""


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own with pictures in it; what a page registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_pictures").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 48), colour).save(tmp_path / "my_pictures" / f"{colour}.png")
    said = warnings.filters[:]
    torch.manual_seed(0)
    yield tmp_path
    warnings.filters[:] = said
    for name in [name for name, cls in METHODS.items() if cls.__module__.startswith(OWN)]:
        del METHODS[name]
    for known in (notes._NOTES, sys.modules):
        for name in [name for name in known if name.startswith(OWN)]:
            del known[name]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_of_a_known_kind(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: a block says its language: {', '.join(sorted(LANGUAGES))}"
        if block.language == "yaml":
            yaml.safe_load(block.text)
        known = block.mark in ("", "run") or block.runs or block.skipped in REASONS
        assert known, f"{block.where}: {block.mark!r}; reasons not to run: {', '.join(REASONS)}"
        assert not block.skipped or block.language == "python", f"{block.where}: commands are parsed all the same"


@pytest.mark.parametrize("page", PROGRAM, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_a_program(
    page: Path, clean: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page; what `print(…)  # text` prints is that text."""
    module = ModuleType(OWN + re.sub(r"\W", "_", str(page.relative_to(ROOT))))
    sys.modules[module.__name__] = module
    for block in blocks(page):
        try:
            if block.language == "python":
                _run_python(block, vars(module), capsys)
            elif block.language == "bash":
                for words in block.commands():
                    _run_command(words, block, monkeypatch)
        except (Exception, SystemExit) as error:
            error.add_note(f"in the block at {block.where}")
            raise


def _run_python(block: Block, space: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    if block.skipped:
        return
    capsys.readouterr()
    exec(code, space)
    printed = capsys.readouterr().out.splitlines()
    for promised in re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE):
        assert promised in printed, f"{block.where}: said to print {promised!r}, printed {printed}"


def _run_command(words: list[str], block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words
    if program == "mmpeft":
        _mmpeft(rest, block, monkeypatch)
    elif program == "make":
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(known), words
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), words
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    else:
        assert program in ("pip", "git", "cd", "jupyter", "mlflow", "tensorboard"), f"{block.where}: {words}"


def _mmpeft(words: list[str], block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    name = words[0]
    if block.runs or name in RUNS:
        assert main([*words, *(block.added if name in TRAINS else [])]) == 0, f"{block.where}: {words}"
        return
    if name in LIGHTNING and words[1].startswith("-"):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--print_config"])
        assert ended.value.code in (0, None), f"{block.where}: {words}"
        return
    with monkeypatch.context() as patch:
        _stop_after_parsing(patch)
        with pytest.raises(Parsed):
            main(words)


def _stop_after_parsing(patch: pytest.MonkeyPatch) -> None:
    """Let commands end once their options are read; those of a comparison once its configuration is."""
    whole, known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        found = whole(self, *args, **kwargs)
        if type(self) is argparse.ArgumentParser:
            raise Parsed
        return found

    def stop_known(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        found = known(self, *args, **kwargs)
        if type(self) is argparse.ArgumentParser and self.prog.split()[-1] in TRAINS - {"compare", "continual"}:
            raise Parsed
        return found

    def compared(*args: Any, **kwargs: Any) -> None:
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(argparse.ArgumentParser, "parse_known_args", stop_known)
    patch.setattr(compare, "compare", compared)

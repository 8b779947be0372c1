"""The public names: the same at run time and in the stubs, and typed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mmpeft
from mmpeft._lazy import exports
from mmpeft.run import domains
from tests.support import stubs, typed

PACKAGES = stubs.packages()
DOMAINS = [f"mmpeft.{name}" for name in stubs.DOMAINS]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_stub_names_what_there_is(package: str) -> None:
    path = stubs.path_of(package)
    assert path.read_text("utf-8") == stubs.text(package), "write it again: python -m tests.support.stubs"
    module = import_module(package)
    tree = ast.parse(path.read_text("utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    own = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {name.name for node in imports for name in node.names} | own == set(stubs.names_of(module))
    for node in imports:
        (name,) = node.names
        home = import_module(str(node.module))
        assert getattr(home, name.name) is getattr(module, name.name)


def test_every_domain_is_filled() -> None:
    for package in DOMAINS:
        domain = import_module(package)
        assert {"TASKS", "DATA", "COMMANDS"} <= set(dir(domain))
        for name, place in {**domain.TASKS, **domain.DATA, **getattr(domain, "PARTS", {})}.items():
            assert place.startswith(f"{package}.")
            assert getattr(domain, name).__name__ == name
        for target in {**getattr(domain, "EXPORTS", {}), **getattr(domain, "PIPELINE_EXPORTS", {})}.values():
            module, _, function = target.partition(":")
            assert callable(getattr(import_module(module), function))
        for target, text in domain.COMMANDS.values():
            module, _, function = target.partition(":")
            assert callable(getattr(import_module(module), function))
            assert text
    assert mmpeft.vision.create is not mmpeft.vla.create
    assert mmpeft.vla.FewShot.__name__ == "FewShot"


def test_nothing_else_can_be_reached() -> None:
    assert not hasattr(mmpeft, "Any")
    assert not hasattr(mmpeft, "import_module")
    assert not hasattr(mmpeft.vision, "Any")
    assert set(dir(mmpeft)) >= {*mmpeft.methods.METHODS, "attach", "vision", "__version__"}
    with pytest.raises(AttributeError, match="Did you mean 'LoRA'"):
        _ = mmpeft.Lora  # type: ignore[attr-defined] # that is the point
    with pytest.raises(AttributeError, match="Did you mean 'ImageClassifier'"):
        _ = mmpeft.vision.ImageClasifier
    with pytest.raises(AttributeError, match=r"has no attribute '_private'$"):
        _ = mmpeft._private  # type: ignore[attr-defined] # that is the point


def test_importing_a_domain_loads_nothing() -> None:
    code = (
        "import sys, mmpeft.vision, mmpeft.vla, mmpeft.diffusion, mmpeft.llm;"
        "assert mmpeft.vision.TASKS and mmpeft.vla.COMMANDS;"
        "print([m for m in ('torch', 'numpy', 'timm', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_places_of_both_kinds() -> None:
    get, names = exports("mmpeft.errors", {"nearest": "x", "other": "mmpeft.errors:ConfigError"}, modules=("y",))
    assert get("other") is mmpeft.errors.ConfigError
    assert names() == ["nearest", "other", "y"]
    with pytest.raises(ModuleNotFoundError):
        get("nearest")


def test_a_users_file_is_typed(tmp_path: Path) -> None:
    """What mypy reveals of the names that are loaded when first used."""
    file = tmp_path / "user.py"
    file.write_text(
        "import mmpeft\nfrom torch import nn\n"
        "reveal_type(mmpeft.attach(nn.Linear(2, 2), mmpeft.LoRA(rank=2)))\n"
        "reveal_type(mmpeft.LoRA(rank=2).rank)\n"
        "reveal_type(mmpeft.vision.create('vit'))\n"
        "reveal_type(mmpeft.vla.FewShot('name').templates)\n"
        "mmpeft.LoRA(rang=2)\nmmpeft.vision.Any\n"
    )
    said = typed.check([str(file)]).stdout
    revealed = [line.partition('Revealed type is "')[2].rstrip('"') for line in said.splitlines() if "Revealed" in line]
    kinds = ["mmpeft.tuning.Tuning", "int", "torch.nn.modules.module.Module", "list[str]"]
    assert [kind.replace("builtins.", "") for kind in revealed] == kinds, said
    assert 'Unexpected keyword argument "rang"' in said
    assert 'has no attribute "Any"' in said


def test_every_class_that_a_configuration_names_stands_in_a_table() -> None:
    """Short names are resolved by the tables alone: nothing else has been imported when a command starts."""
    texts = [path.read_text("utf-8") for path in (stubs.ROOT / "configs").rglob("*.yaml")]
    named = {name for text in texts for name in re.findall(r"(?:class_path: *|callbacks\+ )(\w+)\b(?!\.)", text)}
    known = {*domains.classes(), *mmpeft.methods.__all__}
    assert {"WiseCurve", "OLoRA", "ClipAdapter", "ImageClassifier", "VTABData"} <= named
    assert not named - known

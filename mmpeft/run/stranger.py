"""A configuration that somebody else may have written: data, from which registered classes alone are built.

Parsers of configurations import what these name. Here nothing is imported but installed packages, and no class is
built but tasks, data modules and parts that a domain registers, methods, torch's optimisers and schedulers, and what
the program has imported itself.
"""

from __future__ import annotations

import importlib.machinery
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import lightning
import yaml
from jsonargparse import Namespace
from torch import nn

from mmpeft.errors import ConfigError
from mmpeft.files import read_file, reading_only
from mmpeft.methods.base import Method
from mmpeft.methods.spec import by_name
from mmpeft.run.domains import classes
from mmpeft.types import Config, Json

MOST_BYTES, MOST_VALUES = 2**22, 100_000
"""Of a configuration; aliases make a few lines of YAML a million values."""
KEYS = ("model", "data", "method", "seed_everything", "seed")
"""What is read of a configuration to build a task and its data."""
PLAIN = ("torch.optim.", "lightning.pytorch.cli.")
"""Where optimisers and schedulers come from."""
TRAINER = ("lightning.pytorch.callbacks.", "lightning.pytorch.loggers.", "mmpeft.")
"""Where callbacks and loggers come from."""
CLASS = "class_path"
KINDS = (nn.Module, lightning.LightningDataModule, Method)
"""What a program may have imported of its own."""
REMEDY = "register it in an installed domain (docs/extend/domain.md), or import its module before the run is read"


def read_config(path: Path, keys: Sequence[str] = KEYS) -> Json:
    """The configuration of a run, every class in it one that may be built.

    Args:
        path: of the file.
        keys: what is read of it; nothing else is looked at.

    Raises:
        ConfigError: no YAML, no mapping, more than any run has, or a class that nobody registers.
    """
    try:
        found: object = yaml.safe_load(read_file(path, MOST_BYTES).decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is no configuration of a run: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no configuration of a run: it holds a {type(found).__name__}")
    run = {key: found.get(key) for key in keys}
    known = {name: target.partition(":")[0].partition(".")[0] for name, (_, target) in classes().items()}
    for part in run:
        for key, value in _values(run[part], path):
            plain = part == "trainer" and str(value).startswith(TRAINER)
            if key == CLASS and not plain and not _may_be_named(str(value), known):
                _refuse(path, str(value))
    return run


def check_names(run: Json, path: Path) -> None:
    """Every class in a run's configuration is registered, torch's or Lightning's, or a program's own by its kind.

    `read_config` lets pass what the program has imported; here a function among it, such as `os.system`, is refused
    before a parser takes it for something that makes an optimiser.

    Raises:
        ConfigError: one is not.
    """
    for part in run:
        for key, value in _values(run[part], path):
            module, _, last = str(value).rpartition(".")
            if key != CLASS or not module or str(value).startswith((*PLAIN, *TRAINER)):
                continue
            named = getattr(sys.modules.get(module), last, None)
            if not (last in classes() or last in by_name() or (isinstance(named, type) and issubclass(named, KINDS))):
                _refuse(path, str(value))


def arguments_of(run: Json, key: str) -> Json:
    """What a class under `key` of a configuration is given; nothing where none is written there."""
    part = run.get(key)
    found = part.get("init_args") if isinstance(part, dict) else None
    return found if isinstance(found, dict) else {}


def _values(content: object, path: Path) -> Iterator[tuple[object, object]]:
    """Every key and value of a configuration, as it was written or as it was parsed, those inside others too."""
    waiting, seen = [content], 0
    while waiting:
        for key, value in _pairs(waiting.pop()):
            yield key, value
            waiting.append(value)
            seen += 1
            if seen > MOST_VALUES:
                raise ConfigError(f"{path} has more than {MOST_VALUES:,} values; no run has so many")


def _pairs(content: object) -> Iterable[tuple[object, object]]:
    if isinstance(content, Namespace):
        return vars(content).items()
    if isinstance(content, dict):
        return content.items()
    return enumerate(content) if isinstance(content, list | tuple) else ()


def _may_be_named(name: str, known: dict[str, str]) -> bool:
    module, _, last = name.rpartition(".")
    if module in sys.modules or name.startswith(PLAIN):
        return True
    if last in by_name():
        return module == "" or module.split(".")[0] == "mmpeft"
    return last in known and (module == "" or module.split(".")[0] in ("mmpeft", known[last]))


def _refuse(where: Path, name: str) -> NoReturn:
    raise ConfigError(
        f"{where} names the class {name!r}, which is neither registered nor imported: a run that was found somewhere "
        f"may run no code of its own. If it is yours, {REMEDY}"
    )


@contextmanager
def guarded(where: Path) -> Iterator[Callable[[Config], None]]:
    """Nothing but installed packages is imported inside, and nothing written; gives what checks a parsed run.

    The check raises ConfigError for a class or function in it that may not be built.
    """
    before = set(sys.modules)
    guard = _OnlyInstalled(where)
    sys.meta_path.insert(0, guard)
    try:
        with reading_only(f"what {where} describes"):
            yield lambda run: _check(run, where, before)
    finally:
        sys.meta_path.remove(guard)


def _check(run: Config, where: Path, before: set[str]) -> None:
    registered = {target.replace(":", ".") for _, target in classes().values()}
    own = {f"{cls.__module__}.{cls.__qualname__}" for cls in by_name().values()}
    for key, value in _values(run, where):
        named = value
        if key == CLASS:
            module, _, last = str(value).rpartition(".")
            named = getattr(sys.modules.get(module), last, None)  # the parser has imported it
            if named is None:
                _refuse(where, str(value))
        if not callable(named):
            continue
        name = f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"
        fits = name in registered | own or name.startswith((*PLAIN, "torch.optim", "mmpeft.methods."))
        own_kind = isinstance(named, type) and issubclass(named, KINDS) and named.__module__ in before
        if not fits and not own_kind:
            _refuse(where, name)


class _OnlyInstalled(MetaPathFinder):
    """Refuses modules that lie in no place of installed packages, before they run."""

    def __init__(self, where: Path) -> None:
        self.where = where
        places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        places |= {*site.getsitepackages(), site.getusersitepackages()}
        self.places = tuple(str(Path(place).resolve()) for place in places if place)
        self.registered = {target.partition(":")[0].partition(".")[0] for _, target in classes().values()} | {"mmpeft"}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None or fullname in self.registered:  # the package above it was looked at
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname)
        places = [spec.origin] if spec and spec.origin else list(spec.submodule_search_locations or ()) if spec else []
        if any(not str(Path(place).resolve()).startswith(self.places) for place in places):
            raise ConfigError(
                f"{self.where} would import {fullname} from {places[0]}, which is no installed package: a run that was "
                f"found somewhere may run no code of its own. If it is yours, {REMEDY}"
            )
        return None

"""Libraries that are not installed: which extra of this suite brings each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, requires

from mmpeft.errors import MissingExtraError

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "open_clip": "open-clip-torch"}
"""Modules whose distribution has another name."""


@cache
def _extras() -> dict[str, list[str]]:
    """Name of a module → the extras that install it."""
    found: dict[str, list[str]] = {}
    modules = {distribution: module for module, distribution in _DISTRIBUTIONS.items()}
    for line in requires("mmpeft") or ():
        needed, _, condition = line.partition(";")
        distribution = re.split(r"[\s<>=!~\[(]", needed.strip(), maxsplit=1)[0].lower().replace("_", "-")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
        module = modules.get(distribution, distribution.replace("-", "_"))
        if extra and extra[1] != "dev":
            found.setdefault(module, []).append(extra[1])
    return found


def remedy(library: str, wanted_by: str = "") -> str:
    """How to install a library: by the extra of the domain that wants it, of any other, or by its own name.

    Args:
        library: the module that is missing, such as `torchvision`.
        wanted_by: an extra, or the module that was being imported, such as `mmpeft.diffusion.style`.
    """
    try:
        known, extras = set(metadata("mmpeft").get_all("Provides-Extra") or ()), _extras()
    except PackageNotFoundError:  # the folder is on the path, and nothing was installed
        known, extras = set(), {}
    top = library.partition(".")[0]
    domain = wanted_by.removeprefix("mmpeft.").partition(".")[0]
    extra = domain if domain in known else next(iter(extras.get(top, ())), "")
    return f"pip install 'mmpeft[{extra}]'" if extra else f"pip install {_DISTRIBUTIONS.get(top, top)}"


@contextmanager
def needed_by(what: str, wanted_by: str = "") -> Iterator[None]:
    """Have a library that is missing named with what needs it and how it is installed.

    Raises:
        MissingExtraError: an import inside the block found no such library.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = error.name or ""
        if isinstance(error, MissingExtraError) or not name or name.partition(".")[0] == "mmpeft":
            raise
        how = remedy(name, wanted_by)
        raise MissingExtraError(f"{what} needs {name}: {how}", name=name) from error

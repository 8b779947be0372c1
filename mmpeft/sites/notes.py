"""Notes: what watching a model cannot see, said by the domain that owns the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from torch import nn

from mmpeft.hosting.modules import own_modules
from mmpeft.sites.site import Connect, Site, load_domains, qualified_name
from mmpeft.types import Args, Kwargs

Inputs = tuple[Args, Kwargs]
Note = Callable[[nn.Module, list[Site]], list[Site]]
Examples = Callable[[nn.Module], Inputs | None]

_NOTES: dict[str, Note] = {}
_EXAMPLES: list[Examples] = []
_PREPARES: list[Callable[[nn.Module], None]] = []
_AROUND: list[Callable[[], AbstractContextManager[None]]] = []
_PATHS = ("path", "bias", "stream", "out", "entry", "prefix_reader")


def note(*class_names: str) -> Callable[[Note], Note]:
    """Register a note on the sites of model classes by qualified name: `(model, sites) -> sites`.

    It is given the sites of every module of such a class, with paths from there on: of a model inside a model too.
    """

    def register(function: Note) -> Note:
        _NOTES.update(dict.fromkeys(class_names, function))
        return function

    return register


def example_inputs(function: Examples) -> Examples:
    """Register what gives example inputs `(args, kwargs)` for the models of a library, and None for others."""
    _EXAMPLES.append(function)
    return function


def prepares(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Register what a copy of a model needs before it is watched: another implementation of what a kernel hides."""
    _PREPARES.append(function)
    return function


def prepare(shadow: nn.Module) -> None:
    """Do all that domains ask for to a copy that is to be watched."""
    for function in _PREPARES:
        function(shadow)


def while_watching(function: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Register what holds while a model is watched: kernels of a library that take no tensors without data are off."""
    _AROUND.append(function)
    return function


@contextmanager
def surroundings() -> Iterator[None]:
    """All that domains ask for while a model is watched."""
    with ExitStack() as stack:
        for function in _AROUND:
            stack.enter_context(function())
        yield


def inputs_of(model: nn.Module) -> Inputs | None:
    """Example inputs for a model of a known library."""
    load_domains()
    return next((found for examples in _EXAMPLES if (found := examples(model)) is not None), None)


def noted(model: nn.Module, found: list[Site]) -> list[Site]:
    """Sites with all notes on them, those of inner models first."""
    load_domains()
    notes: list[tuple[str, Note]] = []
    for path, module in own_modules(model):
        own = note_of(type(module))
        if own is not None and not any(own is other and _is_inside(path, around) for around, other in notes):
            notes.append((path, own))
    for path, own in reversed(notes):
        inside = [site for site in found if _is_inside(site.path, path)]
        first = found.index(inside[0]) if inside else 0
        rest = [site for site in found if not _is_inside(site.path, path)]
        model_inside = model.get_submodule(path)
        given = own(model_inside, [_moved(site, partial(_below, path)) for site in inside])
        back = [_moved(site, partial(_above, path)) for site in given]
        found = [*rest[:first], *back, *rest[first:]]
    return found


def note_of(cls: type) -> Note | None:
    """The note on models of a class, or of one that it derives from."""
    return next((_NOTES[name] for base in cls.__mro__ if (name := qualified_name(base)) in _NOTES), None)


def _is_inside(path: str, around: str) -> bool:
    return not around or path == around or path.startswith(f"{around}.")


def _below(around: str, path: str) -> str:
    return path[len(around) + 1 :] if around else path


def _above(around: str, path: str) -> str:
    return f"{around}.{path}".strip(".")


def _moved(site: Site, move: Callable[[str], str]) -> Site:
    """A site with other paths; those it does not have stay empty, `path` may be the model itself."""
    paths: Kwargs = {name: move(value) for name in _PATHS if (value := getattr(site, name)) or name == "path"}
    return replace(site, **paths, connect=_moved_connect(site, move))


def _moved_connect(site: Site, move: Callable[[str], str]) -> Connect | None:
    """Where a prompt enters is a path too."""
    connect = site.connect
    if connect is None or site.role == "kv":
        return connect
    beside = tuple((move(path), run) for path, run in connect.beside)
    return replace(connect, attribute=move(connect.attribute), beside=beside)

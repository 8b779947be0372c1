"""The sites of a model, found once: by an anatomy that was written for it, or by watching one pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmpeft.errors import SiteError
from mmpeft.hosting.host import original_class
from mmpeft.hosting.modules import own_modules
from mmpeft.sites.notes import Inputs, inputs_of, note_of, noted
from mmpeft.sites.reading import read
from mmpeft.sites.site import Site, find_anatomy, param_sites, qualified_name
from mmpeft.sites.watch import watch
from mmpeft.types import Batch

_FOUND: OrderedDict[int, list[Site]] = OrderedDict()
"""Structural sites by the signature of a model: its copies are not watched again."""
_KEPT = 256
_LAST: WeakKeyDictionary[nn.Module, tuple[int, list[Site]]] = WeakKeyDictionary()
"""Of a model itself: it may count its passes or keep what it last saw, which makes it no other model."""
_LOCK = Lock()


def sites(model: nn.Module, example: Batch = None) -> list[Site]:
    """Every site of a model, named tensors (role `param`) included.

    They are found by watching one pass on fake tensors: of `example` (a tensor, a tuple of arguments or a mapping of
    keyword arguments), or of inputs that the model's library is known to take. One watch serves all models of one make.

    Raises:
        SiteError: nothing is known of the model's inputs, or it does not run on them.
    """
    structural = structure(model, example)
    return structural + param_sites(model, structural)


def structure(model: nn.Module, example: Batch = None) -> list[Site]:
    """As `sites`, named tensors left out."""
    written = find_anatomy(model)
    if written is not None:
        return written(model)
    key = signature(model)
    with _LOCK:
        last, found = _LAST.get(model), _FOUND.get(key)
    if found is not None and last is not None and last[1] is found:
        return list(found)
    form = signature(model, numbers=False)
    if found is None and last is not None and last[0] == form:
        found = last[1]
    if found is None:
        found = _watched(model, example)
    _keep(model, key, form, found)
    return list(found)


def watched_sites(model: nn.Module) -> list[Site]:
    """Sites that were found by watching a model; none where an anatomy was written for it, or nobody has watched."""
    if find_anatomy(model) is not None:
        return []
    last = _LAST.get(model)
    return list(last[1]) if last is not None else list(_FOUND.get(signature(model), ()))


def remember(model: nn.Module, found: Iterable[Site]) -> bool:
    """Take sites that were found before, in another process, for those of a model that nobody has watched here.

    False where there is nothing to take them for: they are known, or not of this model.
    """
    found = list(found)
    key = signature(model)
    paths = {path for path, _ in own_modules(model)}
    if not found or find_anatomy(model) or key in _FOUND or any(site.path not in paths for site in found):
        return False
    _keep(model, key, signature(model, numbers=False), noted(model, found))
    return True


@contextmanager
def remembered(model: nn.Module, found: Iterable[Site]) -> Iterator[None]:
    """`remember`, unless something fails inside: what comes from a damaged file is forgotten then."""
    key = signature(model)
    new = remember(model, found)
    try:
        yield
    except BaseException:
        if new:
            with _LOCK:
                _LAST.pop(model, None)
                _FOUND.pop(key, None)
        raise


def _keep(model: nn.Module, key: int, form: int, found: list[Site]) -> None:
    with _LOCK:
        _LAST[model] = form, found
        _FOUND[key] = found
        _FOUND.move_to_end(key)
        while len(_FOUND) > _KEPT:
            _FOUND.popitem(last=False)


def _watched(model: nn.Module, example: Batch) -> list[Site]:
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the caller is in
        given = inputs_of(model) if example is None else as_inputs(example)
    if given is None:
        name = qualified_name(original_class(model))
        raise SiteError(
            f"nothing is known of the inputs of {name}, and its sites are found by watching one pass: give a batch "
            "that it takes, attach(model, method, example=batch), a tensor, a tuple of arguments or a mapping"
        )
    with torch.inference_mode(False), torch.device("cpu"):
        return noted(model, read(model, watch(model, *given)))


def as_inputs(example: Batch) -> Inputs:
    """`(args, kwargs)` of a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def signature(model: nn.Module, numbers: bool = True) -> int:
    """A number that models of the same make share: classes, notes on them, shapes of parameters and plain attributes.

    Without `numbers`, attributes that are numbers or tensors are left out, and buffers.
    """
    known: dict[int, Any] = {}
    parts: list[object] = []
    for path, module in own_modules(model):
        held = {**module._parameters, **(module._buffers if numbers else {})}
        shapes = tuple((name, None if t is None else (tuple(t.shape), id_of(known, t))) for name, t in held.items())
        plain = tuple(
            (name, _plain(value, known))
            for name, value in module.__dict__.items()
            if not name.startswith("_") and name not in ("training", "forward")
            if numbers
            or not (value is None or (isinstance(value, int | float | Tensor) and not isinstance(value, bool)))
        )
        cls = original_class(module)
        parts.append((path, cls, note_of(cls), shapes, plain))
    return hash(tuple(parts))


def id_of(known: dict[int, Any], tensor: Tensor) -> int:
    """The number of a tensor in the order of first sight: tied ones share it."""
    return int(known.setdefault(id(tensor), len(known)))


def _plain(value: object, known: dict[int, Any], depth: int = 0) -> object:
    """What can be compared of an attribute: numbers, texts, and what is made of them; of others the class."""
    if value is None or isinstance(value, bool | int | float | str | bytes | type):
        return value
    if isinstance(value, FunctionType | MethodType):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, nn.Module) or depth > 4:
        return type(value).__qualname__
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = type(value).__qualname__  # what holds itself
    if isinstance(value, Mapping):
        found: tuple[object, ...] | str = tuple((str(k), _plain(v, known, depth + 1)) for k, v in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        found = (type(value).__name__, *(_plain(v, known, depth + 1) for v in value))
    elif hasattr(value, "__dict__"):
        own = vars(value).items()
        found = (type(value).__qualname__, *((k, _plain(v, known, depth + 1)) for k, v in own))
    else:
        found = type(value).__qualname__
    known[id(value)] = found
    return found

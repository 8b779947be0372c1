"""The watch: every tensor operation of one forward pass, and the modules that were running.

The pass runs on fake tensors, which cost neither memory nor compute, and on a real batch where the model's control
flow depends on the data. It runs on a copy of the modules that shares their tensors: the model itself notices nothing.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mmpeft.errors import SiteError
from mmpeft.hosting.answers import multi_head
from mmpeft.hosting.modules import own_modules, own_parameters
from mmpeft.sites.notes import prepare, surroundings
from mmpeft.sites.record import (
    BLANKS,
    PICKS,
    PRODUCTS,
    RESHAPES,
    SLICES,
    SWAPS,
    VIEWS,
    Call,
    Function,
    Op,
    Record,
    Use,
    looks,
    swaps,
)
from mmpeft.sites.shadow import cached_by, faked, shadow_of
from mmpeft.types import AnyFunc, Args, Argument, Kwargs, Output, TorchOp

ATTENTION_FUNCTIONS = {
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
    F.multi_head_attention_forward: "multi_head_attention_forward",
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), "matmul"),
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax), "softmax"),
}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(q kᵀ) v` by products."""
    written = torch.ops.aten._scaled_dot_product_attention_math
    mixed: Tensor = written(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return mixed


KEPT = re.compile(r"\.parametrizations\.\w+\.original\d*$")
"""What torch calls the tensors that it makes a parametrised one of."""


AnyOp: TypeAlias = "TorchOp | HigherOrderOperator"


class _Functions(TorchFunctionMode):
    """Notes which of torch's functions made the operations."""

    def __init__(self, seen: _Watching) -> None:
        super().__init__()
        self.seen = seen
        self.found: list[Function] = []

    def __torch_function__(self, func: AnyFunc, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        first = len(self.seen.ops)
        if func is F.scaled_dot_product_attention:  # written out, whichever kernel would run
            out = _attention(*args, **(kwargs or {}))
        elif func is F.multi_head_attention_forward:
            with self:  # what it calls is watched too
                out = multi_head(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        name = ATTENTION_FUNCTIONS.get(func)
        if name is not None:
            given = [*args, *(kwargs or {}).values()]
            shapes = [tuple(a.shape) for a in given if isinstance(a, Tensor)]
            self.found.append(Function(name, first, len(self.seen.ops), shapes))
        return out


class _Watching(TorchDispatchMode):
    """Records operations and knows which tensors are views of parameters."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.running: list[int] = []
        self.made: dict[int, int] = {}
        self.uses: dict[int, Use] = {}
        self.alive: list[object] = []
        self.names: dict[int, list[str]] = {}
        """Every name of every parameter: one that two modules share has two."""
        for name, tensor in [*own_parameters(model), *model.named_buffers()]:
            self.names.setdefault(id(tensor), []).append(name)
            self.uses.setdefault(id(tensor), Use(name, stacked=tensor.dim() == 3))
        self.aliases = {names[0]: names for names in self.names.values() if len(names) > 1}

    def add(self, name: str, tensors: list[Tensor], static: bool, label: str = "") -> Op:
        """An operation without inputs: an argument of the model, or a tensor that it holds."""
        call = self.running[-1] if self.running else 0
        shape = tuple(tensors[0].shape) if tensors else ()
        op = Op(len(self.ops), name, None, (), {}, [], call, shape, static, label=label)
        op.is_floating = not tensors or tensors[0].is_floating_point()
        self.ops.append(op)
        for tensor in tensors:
            self.made[id(tensor)] = op.index
            op.outs.append(id(tensor))
            self.alive.append(tensor)
        return op

    def source(self, tensor: Tensor) -> int:
        """The operation that made a tensor, or one that stands for a tensor of the model or a constant."""
        found = self.made.get(id(tensor))
        if found is None:
            use = self.uses.get(id(tensor))
            found = self.add("held", [tensor], True, use.name if use else "").index
        return found

    def __torch_dispatch__(self, func: AnyOp, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.higher(func, args)
        read = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        name = func.overloadpacket.__name__
        inputs = [] if name in BLANKS else [self.source(a) for a in read]
        out = func(*args, **kwargs)
        name = name[:-1] if name.endswith("_") and not name.startswith("_") else name
        name = "_grouped_mm" if "grouped_mm" in name else name  # libraries have their own beside torch's
        made = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
        static = all(self.ops[i].static for i in inputs)
        shape = tuple(made[0].shape) if made else ()
        op = Op(len(self.ops), name, func, args, kwargs, inputs, self.running[-1], shape, static)
        op.is_floating = not made or made[0].is_floating_point() or made[0].is_complex()
        uses = [self.uses.get(id(a)) for a in read]
        kept = next((u for u in uses if u and KEPT.search(u.name)), None) if static and name in PRODUCTS else None
        if kept is not None:  # a parametrised weight in the making
            self.derive(name, kept, made, read, args)
        elif name in PRODUCTS:
            op.weight, held = self.product(name, args, read, uses)
            op.held = inputs[held] if op.weight else -1
            static = op.static = static and name != "embedding"
        elif static and (known := self.only(read, uses)):
            self.derive(name, known, made, read, args)
        elif (picked := uses[0] if uses else None) and picked.stacked and looks(name, args):
            self.derive(name, picked, made, read, args)  # of each word, the matrix that it is sent to
        self.ops.append(op)
        for o in made:
            self.made[id(o)] = op.index
            op.outs.append(id(o))
            base = o._base
            if base is not None and func._schema.is_mutable:  # what it is a view of has changed as well
                self.made[id(base)] = op.index
        self.alive += made
        self.alive += read
        return out

    def higher(self, func: HigherOrderOperator, args: Args) -> Output:
        """What takes other functions and has no rule for fake tensors: flex_attention, written out as any attention."""
        if func.name() != "flex_attention":
            raise NotImplementedError(f"{func.name()} under the watch")
        query, key, value, _, _, scale, *_ = args
        with self:
            mixed = _attention(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
        return mixed, mixed.new_empty(mixed.shape[:-1]), mixed.new_empty(mixed.shape[:-1])

    def only(self, read: list[Tensor], uses: list[Use | None]) -> Use | None:
        """The first of the model's own tensors, where an operation reads nothing else but single numbers."""
        known = [use for use in uses if use]
        alone = all(use or tensor.numel() == 1 for use, tensor in zip(uses, read))
        return known[0] if known and alone else None

    def derive(self, name: str, use: Use, made: list[Tensor], read: list[Tensor], args: Args) -> None:
        """Tensors made of a parameter are uses of it too."""
        swapped = use.transposed ^ (name in SWAPS and swaps(name, tuple(read[0].shape), args, use.stacked))
        derived = use.derived or name not in VIEWS | SLICES | PICKS
        for o in made:
            offset = 0 if derived else int(o.storage_offset())
            stacked = use.stacked and (name not in RESHAPES or o.shape[-2:] == read[0].shape[-2:])
            self.uses[id(o)] = Use(use.name, swapped, derived, offset, stacked=stacked)

    def product(self, name: str, args: Args, read: list[Tensor], uses: list[Use | None]) -> tuple[Use | None, int]:
        """The parameter that a product multiplies by, and which of what it reads that is: of several the last."""
        held = [i for i, (a, u) in enumerate(zip(read, uses)) if u and a.dim() > 1]
        if name == "embedding":
            held = held[:1]
        if not held:
            return None, -1
        which = held[-1]
        use, tensor = uses[which], read[which]
        assert use is not None
        plain = name in ("convolution", "linear", "embedding", "mv", "addmv")
        left = not plain and which == (1 if name in ("addmm", "baddbmm") else 0)
        plain |= left
        stored = use.transposed if plain else not use.transposed
        stored |= name == "convolution" and bool(args[6])  # a transposed one keeps [in, out, ...]
        path = self.calls[self.running[-1]].path
        own = next((n for n in self.aliases.get(use.name, ()) if n.rpartition(".")[0] == path), use.name)
        repeated = name == "bmm" and tensor.stride(0) == 0  # one matrix for every row of the batch
        shape = tuple(tensor.shape[1 if repeated else 0 :])
        return Use(own, stored, use.derived, use.offset, shape, use.stacked, left), which


def watch(model: nn.Module, args: Args, kwargs: Kwargs) -> Record:
    """The operations of one pass of a model on an example.

    Raises:
        SiteError: the model does not run on the example; the message has the model's own error.
    """
    try:
        return _watch(model, args, kwargs, _WithoutData(allow_non_fake_inputs=True))
    except Exception as error:  # it looks at its data, or cannot run on this example at all
        failed = error
    if not any(p.is_meta for p in model.parameters()):
        try:
            return _watch(model, args, kwargs, None)
        except Exception as error:
            failed = error
    raise SiteError(
        f"{type(model).__name__} does not run on the example inputs, so that nothing is known of where it can be "
        f"tuned ({type(failed).__name__}: {str(failed).strip().partition(chr(10))[0]}). Give a batch that it takes: "
        "attach(model, method, example=batch)"
    ) from failed


class _WithoutData(FakeTensorMode):
    """Tensors without data, all on the CPU.

    The mode must not install torch's stand-in for a missing GPU: after the next backward pass, with threads for that,
    the process could not fork others that run one.
    """

    avoid_device_init = False


def _watch(model: nn.Module, args: Args, kwargs: Kwargs, fake: FakeTensorMode | None) -> Record:
    shadow = shadow_of(model, fake)
    prepare(shadow)
    seen = _Watching(shadow)
    device = next((p.device for p in shadow.parameters()), torch.device("cpu"))

    def given(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return faked(value, fake) if fake else value.detach().to(device)

    args, kwargs = tree_map(given, (tuple(args), dict(kwargs)))
    with torch.no_grad(), surroundings(), _calls(shadow, seen), fake or nullcontext():
        before = cached_by(shadow)
        try:
            return _pass(shadow, seen, args, kwargs, real=fake is None)
        finally:
            for function, misses in before.items():
                if function.cache_info().misses != misses:  # it holds tensors of the watch, which are no one else's
                    function.cache_clear()


@contextmanager
def _flex_uncompiled() -> Iterator[None]:
    """flex_attention compiles itself, which no mode sees through, unless it is told that somebody debugs it."""
    module: object = sys.modules.get("torch.nn.attention.flex_attention")
    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(module, name, False)
    if module is not None:
        setattr(module, name, True)
    try:
        yield
    finally:
        if module is not None:
            setattr(module, name, before)


def _pass(model: nn.Module, seen: _Watching, args: Args, kwargs: Kwargs, real: bool) -> Record:
    for label, value in {**dict(zip(_arguments(model), args)), **kwargs}.items():
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                seen.add("input", [tensor], False, label)
    functions = _Functions(seen)
    with _flex_uncompiled(), functions, seen:
        output = model(*args, **kwargs)
    outputs = [seen.made[id(t)] for t in tree_leaves(_opened(output)) if isinstance(t, Tensor) and id(t) in seen.made]
    return Record(seen.ops, seen.calls, functions.found, outputs, [seen.alive, args, kwargs, output], real)


def _opened(output: Output) -> object:
    """What a library's own kind of output holds."""
    if isinstance(output, Mapping):
        return dict(output)
    return vars(output) if hasattr(output, "__dict__") and not isinstance(output, Tensor) else output


def _arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:] + [f"input_{i}" for i in range(64)]


@contextmanager
def _calls(model: nn.Module, seen: _Watching) -> Iterator[None]:
    """Every module says when it begins and when it ends, also one of which only the `forward` is called."""
    hooks = []

    def begin(path: str, args: Args, kwargs: Kwargs) -> None:
        parent = seen.running[-1] if seen.running else -1
        call = Call(len(seen.calls), path, parent, len(seen.ops))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        call.reads = [seen.source(t) for t in tensors]
        call.given = [tuple(t.shape) for t in tensors]
        call.first = len(seen.ops)
        seen.calls.append(call)
        seen.running.append(call.index)

    def end(output: Output) -> None:
        call = seen.calls[seen.running.pop()]
        call.last = len(seen.ops)
        tensors = [t for t in tree_leaves(_opened(output)) if isinstance(t, Tensor)]
        call.gives = [seen.source(t) for t in tensors]
        call.shapes = [tuple(t.shape) for t in tensors]

    def direct(path: str, forward: AnyFunc) -> AnyFunc:
        @wraps(forward)
        def run(*args: Argument, **kwargs: Argument) -> Output:
            if seen.running and seen.calls[seen.running[-1]].path == path:
                return forward(*args, **kwargs)
            begin(path, args, kwargs)
            output = forward(*args, **kwargs)
            end(output)
            return output

        return run

    try:
        for path, module in own_modules(model):
            before = partial(lambda path, module, args, kwargs: begin(path, args, kwargs), path)
            hooks.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda module, args, output: end(output)))
            if not isinstance(module, torch.jit.ScriptModule):
                module.forward = direct(path, module.forward)
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""Whatever is raised in the middle of a change, the model is bit for bit as before, route included."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import MMPEFTError
from mmpeft.hosting.modules import CHILD
from mmpeft.surgery.state import state_of
from mmpeft.surgery.transaction import unchanged_on_error
from tests.support.moved import perturb
from tests.unit.toy import Toy

ROOT = str(Path(mmpeft.__file__).parent)
LORA = mmpeft.LoRA(rank=2, at="attn.q|mlp.up")
X = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.tensor([0, 1, 2]))]


def _picture(model: nn.Module) -> dict[str, Any]:
    """Everything that may be told of a model from outside, and its answer."""
    state = state_of(model)
    return {
        "classes": [(path, type(module), module.training) for path, module in model.named_modules()],
        "objects": [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flags": [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "tunings": list(mmpeft.tunings(model)),
        "merged": None if state is None else list(state.merged),
        "route": None if state is None else state.route,
        "hosts": None if state is None else sorted(state.hosts),
        "answer": model(X).detach(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _assert_same(before: dict[str, Any], after: dict[str, Any], where: object) -> None:
    for key in before:
        assert _same(before[key], after[key]), (where, key)


class Stop(BaseException):
    """As an interrupt: nothing catches it on purpose."""


@contextmanager
def _at(number: int, error: type[BaseException] = Stop):
    """Raise when the suite calls a function of its own for the `number`-th time; the count is in what is given."""
    seen = [0]

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_flags & inspect.CO_GENERATOR:  # also called to be closed, where nothing can be raised
            return
        if event == "call" and code.co_filename.startswith(ROOT) and not code.co_filename.endswith("transaction.py"):
            seen[0] += 1
            if seen[0] == number:
                sys.setprofile(None)
                raise error

    sys.setprofile(profile)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def _plain(folder: Path) -> nn.Module:
    return Toy()


def _two(folder: Path) -> nn.Module:
    """Two tunings, one row each of a batch of three, and one row plain."""
    model = Toy()
    perturb(mmpeft.attach(model, LORA, name="a"))
    perturb(mmpeft.attach(model, mmpeft.BitFit(), name="b"))
    mmpeft.use(model, ["a", "b", None])
    return model


def _one(folder: Path) -> nn.Module:
    model = Toy()
    perturb(mmpeft.attach(model, mmpeft.AdaLoRA(rank=2, target=1, at="attn.q|mlp.up")))
    return model


def _merged(folder: Path) -> nn.Module:
    model = _one(folder)
    mmpeft.tunings(model)["default"].merge()
    return model


def _native(folder: Path) -> Path:
    return perturb(mmpeft.attach(Toy(), LORA)).save(folder / "native")


def _peft(folder: Path) -> Path:
    tuning = perturb(mmpeft.attach(Toy(), LORA + mmpeft.LinearProbe()))
    return tuning.export(folder / "peft", verify=False).path


def _bank(folder: Path) -> Path:
    bank = mmpeft.Bank(Toy())
    bank.add_task("first", LORA)
    bank.add_task("second", mmpeft.BitFit(), head=mmpeft.bank.LinearHead(3, range(2)))
    return bank.save(folder / "bank")


def _bake(model: nn.Module) -> None:
    mmpeft.tunings(model)["default"].for_inference()


SPT = {"budget": 60, "structured": mmpeft.LoRA(rank=1, at="attn.q")}
Change = Callable[[nn.Module, Path], Any]
CHANGES: dict[str, tuple[Callable[[Path], nn.Module], Callable[[Path], Path] | None, Change]] = {
    "attach": (_plain, None, lambda m, _: mmpeft.attach(m, LORA + mmpeft.BitFit())),
    "attach a third": (_two, None, lambda m, _: mmpeft.attach(m, mmpeft.NormTuning(), name="c")),
    "attach by data": (_two, None, lambda m, _: mmpeft.attach(m, mmpeft.FishMask(), name="c", data=DATA)),
    "detach": (_two, None, lambda m, _: mmpeft.detach(m, "a")),
    "detach the last": (_one, None, lambda m, _: mmpeft.detach(m, "default")),
    "load": (_plain, _native, lambda m, f: mmpeft.load(m, f)),
    "load a third": (_two, _native, lambda m, f: mmpeft.load(m, f, name="c")),
    "load_foreign": (_plain, _peft, lambda m, f: mmpeft.load_foreign(m, f)),
    "load_foreign, a third": (_two, _peft, lambda m, f: mmpeft.load_foreign(m, f, name="c")),
    "Bank.load": (_plain, _bank, lambda m, f: mmpeft.Bank.load(m, f)),
    "Bank.load, beside others": (_two, _bank, lambda m, f: mmpeft.Bank.load(m, f)),
    "merge": (_one, None, lambda m, _: mmpeft.tunings(m)["default"].merge()),
    "unmerge": (_merged, None, lambda m, _: mmpeft.tunings(m)["default"].unmerge()),
    "bake": (_one, None, lambda m, _: _bake(m)),
    "allocate": (_plain, None, lambda m, _: mmpeft.allocate(m, DATA, **SPT)),
    "resolve": (_plain, None, lambda m, _: mmpeft.LTSFT(steps=2, lr=0.1).resolve(m, DATA)),
    "soup": (_two, _native, lambda m, f: mmpeft.soup(m, [f, f])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    make, file, change = CHANGES[name]
    model, path = make(tmp_path), tmp_path if file is None else file(tmp_path)
    change(copy.deepcopy(model), path)  # some things are done but once: classes made, modules imported
    twin = copy.deepcopy(model)
    _picture(twin)  # routes are planned when they first run
    with _at(-1) as seen:
        change(twin, path)
    total, points = seen[0] - 5, 8 if name == "resolve" else 24  # a few calls more or less are the collector's
    assert total > 10
    for number in sorted({1 + i * (total - 1) // points for i in range(points + 1)}):
        twin = copy.deepcopy(model)
        before = _picture(twin)
        with pytest.raises(Stop), _at(number):
            change(twin, path)
        assert torch.is_grad_enabled()
        _assert_same(before, _picture(twin), f"call {number} of {total}")
    change(twin, path)  # and nothing is in the way of doing it now


def test_a_bank_that_fails_to_fold_has_all_its_entries() -> None:
    bank = mmpeft.Bank(Toy(), extract=lambda model, x: model(x))
    for name in ("a", "b"):
        bank.add_task(name, LORA)
        perturb(bank.tuning(name))
    twin = copy.deepcopy(bank)
    _picture(twin.model)
    with _at(-1) as seen:
        twin.fold(["a", "b"])
    ids = bank.ids
    for number in range(1, seen[0], max(1, seen[0] // 20)):
        bank = copy.deepcopy(bank)
        before = _picture(bank.model)
        with pytest.raises(Stop), _at(number):
            bank.fold(["a", "b"])
        assert bank.ids == ids
        _assert_same(before, _picture(bank.model), number)
        with pytest.raises(Stop), _at(max(1, number // 4)):
            bank.add_task("c", mmpeft.BitFit())
        assert bank.ids == ids
    bank.fold(["a", "b"])
    assert bank.ids == ["folded"]


def test_methods_that_cannot_be_placed_change_nothing() -> None:
    model = _two(Path())
    before = _picture(model)
    for method in (
        mmpeft.LoRA(at="cross.q"),
        mmpeft.VPT(tokens=2),
        mmpeft.LoRA(at="attn.q", rank_pattern={"mlp.*": 2}),
    ):
        with pytest.raises(MMPEFTError):
            mmpeft.attach(model, method, name="c")
        _assert_same(before, _picture(model), method)


def test_what_is_put_back_is_all_that_a_change_touches() -> None:
    model = Toy()
    tuning = perturb(mmpeft.attach(model, LORA))
    before = _picture(model)

    def change() -> None:
        mmpeft.attach(model, mmpeft.BitFit(), name="other")
        tuning.detach()
        model.head = nn.Linear(8, 3)
        model.blocks[0].q._parameters["bias"] = nn.Parameter(torch.zeros(8))
        model.blocks[0].norm.eval()
        model.blocks[0].requires_grad_(True)
        model.note = 1
        raise Stop

    with pytest.raises(Stop), unchanged_on_error(model):
        change()
    _assert_same(before, _picture(model), "all at once")
    assert not hasattr(model, "note")
    assert CHILD in model.blocks[0].q._modules

"""`mmpeft.testing` on models and methods of somebody else's: each invariant catches the method that breaks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError, Refused, SiteError
from mmpeft.methods import METHODS
from mmpeft.methods.base import Sited, register
from mmpeft.parts import Hook, Part, Placement
from mmpeft.testing import INVARIANTS, InvariantError, check
from tests.unit.toy import Toy

X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(3))


class Sound(Part):
    """`y + b`; each of those below breaks one thing of it."""

    scalable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(width))

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        assert params["bias"] is not None
        params["bias"] = params["bias"] + self.b


class Loud(Sound):
    def exit(self, host, x, y):
        return y + self.b + 0.1


class Dead(Sound):
    def __init__(self, width):
        super().__init__(width)
        self.unused = nn.Parameter(torch.zeros(width))


class Leaking(Sound):
    def exit(self, host, x, y):
        host.weight.data.mul_(1.001)
        return super().exit(host, x, y)


class Mixing(Sound):
    def exit(self, host, x, y):
        return y + self.b * (1 + y.mean(0, keepdim=True))


class Forgetful(Sound):
    """What it does depends on a tensor that no file holds."""

    def __init__(self, width):
        super().__init__(width)
        self.noise = torch.randn(width)

    def exit(self, host, x, y):
        return y + self.b * self.noise


class Stale(Sound):
    """Reads its tensor once for all."""

    seen = None

    def exit(self, host, x, y):
        self.seen = self.b.detach().clone() if self.seen is None else self.seen
        return y + self.seen


class Unsaved(Sound):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass


class Local(Sound):
    def __init__(self, width):
        super().__init__(width)
        self.add = lambda y: y


class Sharing(Sound):
    """A closure keeps the tensor of the original in every copy."""

    def __init__(self, width):
        super().__init__(width)
        self.add = lambda y: y + self.b

    def exit(self, host, x, y):
        return self.add(y)


class Counting(Sound):
    def exit(self, host, x, y):
        return y + self.b * len(y)


class Growing(Sound):
    def exit(self, host, x, y):
        grown = 1e38 * 1e3 if torch.is_autocast_enabled("cpu") else 1.0
        return y + self.b * torch.tensor(grown)


class Wrong(Sound):
    def fold(self, host, hook, params):
        params["bias"] = params["bias"] + 2 * self.b


@dataclass(frozen=True)
class Odd(Sited):
    at: str = "mlp.down"
    part: ClassVar[type[Sound]] = Sound
    surplus: ClassVar[int] = 0

    def place(self, model, available):
        return [
            Placement(self.part(8), site.path, "odd", (Hook(site.path, "exit"),), site.role)
            for site in self.chosen(available)
        ]

    def count(self, model, available):
        return 8 * len(self.chosen(available)) + self.surplus


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch):
    """A registered method with some part, forgotten afterwards."""
    monkeypatch.setitem(METHODS, "Odd", None)

    def make(part: type[Sound] = Sound, surplus: int = 0, mergeable: bool = True) -> Odd:
        monkeypatch.setattr(Odd, "part", part)
        monkeypatch.setattr(Odd, "surplus", surplus)
        return register("", "additive", mergeable=mergeable)(Odd)()

    return make


def broken(method: mmpeft.Method, *names: str, model: nn.Module | None = None) -> InvariantError:
    with pytest.raises(InvariantError) as caught:
        check(Toy() if model is None else model, X, method, only=names or None)
    return caught.value


def test_a_sound_method_keeps_everything_that_applies(odd) -> None:
    model = Toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = check(model, X, odd())
    assert {*report.held, *report.not_applicable} == {name for name, own in INVARIANTS.items() if own.always}
    assert not report.not_applicable
    assert type(model) is Toy
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert f"{len(report.held)} invariants hold" in str(report)
    assert "saved_and_loaded: The file holds the trainable bytes" in str(report)


@pytest.mark.parametrize(
    ("part", "invariant", "where"),
    [
        (Loud, "starts_as_the_base", "the model's answer"),
        (Dead, "trains_its_own_tensors_alone", "method.count"),
        (Leaking, "learns_and_moves_nothing_else", "blocks.0.down.weight"),
        (Mixing, "rows_have_their_own_route", "rows"),
        (Forgetful, "saved_and_loaded", "the model's answer"),
        (Stale, "off_is_the_base", "the model's answer"),
        (Unsaved, "state_dict_goes_round", "Toy"),
        (Sharing, "copies_share_nothing", "the copy's answer"),
        (Local, "pickles_go_round", "Toy"),
        (Counting, "gradients_accumulate", "odd.b"),
        (Growing, "close_in_bfloat16", "odd.b"),
        (Wrong, "merges_into_what_runs", "the model's answer"),
    ],
)
def test_what_breaks_an_invariant_is_caught_by_its_name(odd, part, invariant, where) -> None:
    error = broken(odd(part), invariant)
    assert error.invariant == invariant
    assert where in error.where
    assert isinstance(error, AssertionError)
    assert str(error).startswith(f"{invariant}: Odd(at='mlp.down') at {error.where}: expected ")


def test_a_dead_tensor_is_named(odd) -> None:
    error = broken(odd(Dead, surplus=16), "trains_its_own_tensors_alone", "learns_and_moves_nothing_else")
    assert error.invariant == "learns_and_moves_nothing_else"
    assert error.where == "blocks.0.down.odd.unused"


def test_a_method_that_merges_must_say_so(odd) -> None:
    error = broken(odd(mergeable=False), "merges_into_what_runs")
    assert (error.expected, error.received) == ("a refusal, for the method says mergeable=False", "none")


def test_an_exception_inside_is_a_broken_invariant(odd) -> None:
    class Failing(Sound):
        def frozen(self):
            raise RuntimeError("not today")

    error = broken(odd(Failing), "saved_and_loaded")
    assert "RuntimeError: not today" in error.received


def test_why_an_invariant_does_not_apply() -> None:
    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.second(x - x.mean(0, keepdim=True))

    report = check(Together(), X, mmpeft.LoRA(rank=2, at="kind=linear"))
    assert "depend on one another" in report.not_applicable["rows_have_their_own_route"]
    assert "names no blocks" in report.not_applicable["recomputes_the_same_gradients"]
    report = check(Toy(), X, mmpeft.Pfeiffer(at="block", bottleneck=2), only=["merges_into_what_runs"])
    assert "cannot be merged" in report.not_applicable["merges_into_what_runs"]
    assert report.held == []


def test_an_expected_refusal_leaves_the_model_untouched(odd) -> None:
    report = check(Toy(), X, mmpeft.CoOp(), refuses="needs words of a text tower")
    assert "needs words" in report.refusal
    assert "untouched" in str(report)
    with pytest.raises(SiteError, match="needs words"):
        check(Toy(), X, mmpeft.CoOp())
    with pytest.raises(InvariantError, match="expected a refusal: two streams, received CoOp needs"):
        check(Toy(), X, mmpeft.CoOp(), refuses="two streams")
    with pytest.raises(InvariantError, match="expected a refusal: never, received none"):
        check(Toy(), X, odd(), refuses="never")


def test_a_refusal_that_writes_into_the_model_is_caught() -> None:
    class Rude(Odd):
        def place(self, model, available):
            with torch.no_grad():
                model.head.weight.add_(1.0)
            raise Refused("no thanks")

    with pytest.raises(InvariantError, match=r"refusal_changes_nothing: .*the model's answer"):
        check(Toy(), X, Rude(), refuses="no thanks")


def test_a_method_that_chooses_by_data_scores_the_batch() -> None:
    report = check(Toy(), X, mmpeft.SAMMask(density=0.2, batches=1), only=["starts_as_the_base", "saved_and_loaded"])
    assert len(report.held) == 2


def test_an_unknown_invariant_has_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'merges_into_what_runs'"):
        check(Toy(), X, mmpeft.BitFit(), only=["merges_into_what_run"])

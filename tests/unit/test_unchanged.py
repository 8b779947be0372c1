"""What is kept while nothing changes: what counts as a change, and DoRA's norms, which are those of the weight now."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.hosting.unchanged import Kept, Unchanged
from tests.support.moved import attach_moved
from tests.unit.toy import Toy

CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.detach().mul_(2),
    "data in place": lambda p: p.data.mul_(2),
    "data copied": lambda p: p.data.copy_(torch.randn(6, 5)),
    "data replaced": lambda p: setattr(p, "data", p.data * 2),
    "a row through data": lambda p: p.data[4].add_(1),
    "half": lambda p: setattr(p, "data", p.data.half()),
    "fewer rows": lambda p: setattr(p, "data", p.data[:3]),
    "seen otherwise": lambda p: setattr(p, "data", p.data.view(5, 6)),
    "reinterpreted": lambda p: setattr(p, "data", p.data.view(torch.int32).view(torch.float32) + 0),
    "numpy": lambda p: p.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("entries", [None, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_change_a_parameter_is_seen(change: str, entries: int | None) -> None:
    tensors = [nn.Parameter(torch.randn(6, 5)), torch.randn(7), torch.randn(())]
    unchanged = Unchanged(entries)
    assert not unchanged.holds(tensors)
    assert unchanged.note(tensors)
    assert unchanged.holds(tensors)
    assert not unchanged.holds(tensors[:2])
    if entries is None or "row" not in change:
        CHANGES[change](tensors[0])
        assert not unchanged.holds(tensors)


def test_an_equal_tensor_is_another_and_one_that_is_gone_holds_nothing() -> None:
    first = torch.randn(4, 4)
    unchanged = Unchanged()
    unchanged.note([first])
    assert not unchanged.holds([first.clone()])
    assert not unchanged.holds([first.view(4, 4)])
    place = first.data_ptr()
    del first
    again = [torch.randn(4, 4) for _ in range(20)]
    assert not any(unchanged.holds([t]) for t in again if t.data_ptr() == place)


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(5, 4).t(), torch.randn(6, 6)[::2, 1:3], torch.randn(3, 1).expand(3, 4), torch.randn(0, 3)],
    ids=["transposed", "strided", "expanded", "empty"],
)
def test_any_layout_can_be_noted(tensor: Tensor) -> None:
    unchanged = Unchanged()
    assert unchanged.note([tensor])
    assert unchanged.holds([tensor])
    if tensor.numel():
        tensor.data[-1, -1] += 1  # the last row is looked at where a row has one entry more than there are rows
        tensor.data[0, 0] += 1
        assert not unchanged.holds([tensor])


def test_types_inference_tensors_and_what_has_no_memory() -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64):
        tensor = torch.ones(4, 3).to(dtype)
        unchanged = Unchanged()
        assert unchanged.note([tensor])
        assert unchanged.holds([tensor])
        tensor.data.zero_()
        assert not unchanged.holds([tensor])
    with torch.inference_mode():
        tensor = torch.ones(4, 3)
        unchanged = Unchanged()
        assert unchanged.note([tensor])
        assert unchanged.holds([tensor])
        tensor.zero_()
        assert not unchanged.holds([tensor])
    assert not Unchanged().note([torch.empty(3, device="meta")])
    storage = torch.randn(100, 3)
    unchanged = Unchanged()
    unchanged.note([storage])
    storage.untyped_storage().resize_(0)  # as FSDP does between passes: nothing is read there
    assert not unchanged.holds([storage])


def test_a_value_is_made_anew_after_a_change_and_not_copied() -> None:
    tensor, calls = torch.ones(3, 2), []
    kept: Kept[Tensor] = Kept()

    def value() -> Tensor:
        calls.append(0)
        return tensor.sum()

    for _ in range(3):
        assert kept.get([tensor], value) == 6
    assert len(calls) == 1
    tensor.data.fill_(2)
    assert kept.get([tensor], value) == 12
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.get([tensor], lambda: torch.zeros(())) == 0


# -- DoRA -------------------------------------------------------------------------------------------------------


DORA = mmpeft.DoRA(rank=2, at="attn.q|mlp.*")


def _reference(model: nn.Module, tuning: mmpeft.Tuning) -> Toy:
    """An untouched model with `m (W + sBA) / ‖W + sBA‖` in place of each W that `model` has now."""
    plain = Toy()
    base = {n: p for n, p in model.state_dict().items() if ".mmpeft." not in f".{n}"}
    plain.load_state_dict(base)
    with torch.no_grad():
        for placement in tuning.placements:
            part, weight = placement.part, plain.get_submodule(placement.home).weight
            tuned = weight + part.scale * part.factor.B.float() @ part.factor.A.float()
            weight.copy_(tuned * (part.magnitude.float() / tuned.norm(dim=1))[:, None])
    return plain


def _load(model: nn.Module) -> None:
    state = {n: torch.randn_like(t) for n, t in model.state_dict().items() if ".mmpeft." not in f".{n}"}
    model.load_state_dict(state, strict=False)


def _data(model: nn.Module) -> None:
    for block in model.blocks:
        block.q._parameters["weight"].data.copy_(torch.randn(8, 8))
        block.up._parameters["weight"].data.mul_(3)
        block.down._parameters["weight"].data = torch.randn(8, 16)


def _ema(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".mmpeft." in name:
            parameter.data.mul_(1.5)


def _step(model: nn.Module) -> None:
    own = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        model(torch.randn(2, 3, 8)).square().sum().backward()
    torch.optim.SGD(own, 0.1).step()


MOVES = {"loaded": _load, "data": _data, "averaged": _ema, "trained": _step, "doubled and back": lambda m: m.double()}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_norms_are_those_of_the_weight_now(move: str, mode: Callable[[], object]) -> None:
    model = Toy()
    tuning = attach_moved(model, DORA, "dora")
    model.eval()
    x = torch.randn(2, 3, 8)
    with mode():
        for _ in range(2):
            torch.testing.assert_close(model(x), _reference(model, tuning)(x), atol=1e-5, rtol=1e-5)
    MOVES[move](model)
    model.float()
    with mode():
        for _ in range(2):
            torch.testing.assert_close(model(x), _reference(model, tuning)(x), atol=1e-4, rtol=1e-4)
    model.train()
    model(x).sum().backward()  # what inference has kept serves a backward pass


def test_in_half_precision() -> None:
    model = Toy()
    tuning = attach_moved(model, DORA, "dora")
    model.eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        model(x)
        model.bfloat16()
        half = model(x.bfloat16())
        torch.testing.assert_close(half.float(), _reference(model, tuning)(x), atol=0.05, rtol=0.05)


def test_above_an_update_that_was_merged() -> None:
    model, x = Toy(), torch.randn(2, 3, 8)
    below = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.q"), "below")
    with torch.no_grad():
        for parameter in below.parameters():
            parameter.normal_()
    tuning = attach_moved(model, DORA, "dora")
    model.eval()
    with torch.no_grad():
        model(x)
        below.merge()
        mmpeft.use(model, "dora")
        torch.testing.assert_close(model(x), _reference(model, tuning)(x), atol=1e-4, rtol=1e-4)
        below.unmerge()
        mmpeft.use(model, "dora")
        torch.testing.assert_close(model(x), _reference(model, tuning)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
@pytest.mark.parametrize("kept", [True, False])
def test_the_short_way_of_one_token(shape: tuple[int, ...], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpeft.parts.delta.KEPT_TO", 1 << 20 if kept else 0)
    model = Toy()
    tuning = attach_moved(model, DORA, "dora")
    plain, x = _reference(model, tuning), torch.randn(shape)
    for layer, wanted in ((model.blocks[0].q, plain.blocks[0].q), (model.blocks[1].up, plain.blocks[1].up)):
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(layer(x), wanted(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x), wanted(x), atol=1e-5, rtol=1e-5)


def test_a_gain_is_made_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmpeft.parts import delta

    calls, norms = [], delta.low_rank_row_norms
    monkeypatch.setattr(delta, "low_rank_row_norms", lambda *args: calls.append(0) or norms(*args))
    model = Toy()
    attach_moved(model, DORA, "dora")
    model.eval()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(2, 3, 8))
    assert len(calls) == 6  # one for each of the six linears
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        copied(torch.randn(2, 3, 8))
    assert len(calls) == 12

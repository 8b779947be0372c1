"""A route belongs to the thread, task or generator that chose it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import ConfigError, Refused
from mmpeft.surgery.state import state_of
from tests.unit.toy import Toy

NAMES = ("a", "b", "c", None)
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))


def tuned() -> tuple[nn.Module, dict[str | None, Tensor]]:
    """A model with three tunings, the last one in use, and the right answer of each, from merged copies."""
    torch.manual_seed(0)
    model = Toy().eval()
    plain = copy.deepcopy(model)
    answers: dict[str | None, Tensor] = {None: plain(X).detach()}
    for name in filter(None, NAMES):
        tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.*|mlp.*"), name)
        with torch.no_grad():
            for parameter in tuning.parameters():
                parameter.normal_()
        tuning.merge()
        answers[name] = copy.deepcopy(model)(X).detach()
        tuning.unmerge()
    return model, answers


def right(model: Callable[[Tensor], Tensor], answer: Tensor) -> bool:
    return torch.allclose(model(X), answer, atol=1e-5)


@pytest.fixture(params=["eager", "compiled"])
def served(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[Tensor], Tensor], dict[str | None, Tensor]]:
    model, answers = tuned()
    torch._dynamo.reset()
    run = model if request.param == "eager" else torch.compile(model, backend="eager")
    return model, run, answers


@torch.no_grad()
def test_threads(served) -> None:
    model, run, answers = served
    for name in NAMES if run is not model else ():  # dynamo traces one call at a time
        with mmpeft.use(model, name):
            assert right(run, answers[name])
    calls, wrong = 60, []
    together = threading.Barrier(5)

    def work(own: list[str | None]) -> None:
        with torch.no_grad():
            together.wait()
            for i in range(calls):
                name = own[i % len(own)]
                with mmpeft.use(model, name):
                    if not right(run, answers[name]):
                        wrong.append(name)

    threads = [threading.Thread(target=work, args=([*NAMES[i:], *NAMES[:i]],)) for i in range(4)]
    for thread in threads:
        thread.start()
    together.wait()
    for _ in range(calls):  # in no block of its own: the model's own choice, whatever the others do
        if not right(run, answers["c"]):
            wrong.append("own")
    for thread in threads:
        thread.join()
    assert not wrong
    assert state_of(model).route == "c"


@torch.no_grad()
def test_tasks(served) -> None:
    model, run, answers = served

    async def answer(name: str | None) -> bool:
        with mmpeft.use(model, name):
            found = []
            for _ in range(5):
                await asyncio.sleep(0)
                found.append(right(run, answers[name]))
            found.append(await asyncio.to_thread(lambda: torch.allclose(model(X), answers[name], atol=1e-5)))
            return all(found)

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*(answer(name) for name in NAMES * 3))

    assert all(asyncio.run(all_of_them()))
    assert right(run, answers["c"])


@torch.no_grad()
def test_suspended_generators(served) -> None:
    model, run, answers = served

    def stream(name: str | None) -> Iterator[bool]:
        with mmpeft.use(model, name):
            while True:
                yield right(run, answers[name])

    async def asynchronous(name: str | None) -> AsyncIterator[bool]:
        with mmpeft.use(model, name):
            while True:
                await asyncio.sleep(0)
                yield right(run, answers[name])

    streams = {name: stream(name) for name in NAMES}
    for _ in range(3):
        for name, one in streams.items():
            assert next(one), name
            assert right(run, answers["c"])
            with mmpeft.use(model, "b"):
                assert right(run, answers["b"])
                assert next(one), name
                assert right(run, answers["b"])
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(next(streams["a"])))  # as servers hand generators around
    thread.start()
    thread.join()
    assert found == [True]
    del streams, one
    assert not state_of(model).generators
    assert right(run, answers["c"])

    async def tasks() -> None:
        own = [asynchronous(name) for name in NAMES]
        for _ in range(3):
            for one in own:
                assert await anext(one)
                assert right(run, answers["c"])
        for one in own:
            await one.aclose()

    asyncio.run(tasks())


def test_a_context_manager_made_of_a_generator_brackets_its_block() -> None:
    model, answers = tuned()

    @contextlib.contextmanager
    def serving(name: str | None) -> Iterator[None]:
        with mmpeft.use(model, name):
            yield

    def stream(name: str | None) -> Iterator[bool]:
        with serving(name):
            yield right(model, answers[name])
            yield right(model, answers[name])

    with serving("a"):
        assert right(model, answers["a"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(mmpeft.use(model, "b"))
            assert right(model, answers["b"])
        assert right(model, answers["a"])
        one = stream(None)
        assert next(one)
        assert right(model, answers["a"])
        assert next(one)
    assert right(model, answers["c"])


def test_without_a_block_it_stays_for_everybody() -> None:
    model, answers = tuned()
    found: list[bool] = []

    def elsewhere(name: str | None) -> bool:
        thread = threading.Thread(target=lambda: found.append(right(model, answers[name])))
        thread.start()
        thread.join()
        return found.pop()

    mmpeft.use(model, "a")
    assert right(model, answers["a"])
    assert elsewhere("a")
    shown = mmpeft.use(model, "b")  # as a notebook keeps it
    assert repr(shown) == "use('b')"
    assert elsewhere("b")
    with mmpeft.use(model, None):
        assert elsewhere("b")
        mmpeft.use(model, "c")
        assert right(model, answers["c"])
        assert elsewhere("b")
    assert right(model, answers["b"])


def test_copies_run_what_was_chosen() -> None:
    model, answers = tuned()
    with mmpeft.use(model, "a"):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert right(model, answers["c"])
    for twin in twins:
        assert right(twin, answers["a"])
        with mmpeft.use(model, "b"), mmpeft.use(twin, None):
            assert right(twin, answers[None])
            assert right(model, answers["b"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_users_checkpoint_is_repeated_under_its_own_route(reentrant: bool, whole: bool) -> None:
    """The route may have changed when the backward pass comes, and it may run in another thread."""
    model, _ = tuned()
    gradients: dict[str | None, list[Tensor]] = {}
    x = X.clone().requires_grad_()
    trained = [list(t.parameters()) for n, t in mmpeft.tunings(model).items() if n in ("a", "b")]

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self._block = (block,)

        def __call__(self, x: Tensor) -> Tensor:
            return checkpoint(self._block[0].__call__, x, use_reentrant=reentrant)

    blocks = nn.Module.__getattr__(model, "blocks")
    for name, own in zip("ab", trained):
        with mmpeft.use(model, name):
            gradients[name] = torch.autograd.grad(model(x).square().sum(), own)
    run = list(blocks._modules.items())
    for key, block in run:
        blocks._modules[key] = Checkpointed(block)  # type: ignore[assignment]
    losses = {}
    for name in "ab":  # a reentrant checkpoint needs an input with a gradient
        with mmpeft.use(model, name):
            losses[name] = model(x).square().sum()
    found: dict[str, list[Tensor]] = {}

    def backward(names: str) -> None:
        for parameters in trained:
            for parameter in parameters:
                parameter.grad = None
        sum(losses[name] for name in names).backward()
        for name, own in zip("ab", trained):
            if name in names:
                found[name] = [p.grad.clone() for p in own]

    if whole:
        backward("ab")
    else:
        thread = threading.Thread(target=backward, args=("b",))
        thread.start()
        thread.join()
        with mmpeft.use(model, None):
            backward("a")
    for name in "ab":
        for ours, theirs in zip(found[name], gradients[name]):
            torch.testing.assert_close(ours, theirs)


def test_changes_wait_for_passes_or_are_refused() -> None:
    model, answers = tuned()
    inside, go_on = threading.Event(), threading.Event()

    def hold(module: nn.Module, args: object) -> None:
        inside.set()
        go_on.wait(5)

    handle = model.blocks[1].register_forward_pre_hook(hold)
    found: list[bool] = []
    running = threading.Thread(target=lambda: found.append(right(model, answers["c"])))
    running.start()
    inside.wait(5)
    changing = threading.Thread(target=lambda: mmpeft.attach(model, mmpeft.BitFit(), "d"))
    changing.start()
    changing.join(0.05)
    assert changing.is_alive(), "it did not wait"
    go_on.set()
    running.join(5)
    changing.join(5)
    handle.remove()
    assert found == [True]
    assert set(mmpeft.tunings(model)) == {"a", "b", "c", "d"}

    held, leave = threading.Event(), threading.Event()

    def user() -> None:
        with mmpeft.use(model, "a"):
            held.set()
            leave.wait(5)

    thread = threading.Thread(target=user)
    thread.start()
    held.wait(5)
    with pytest.raises(Refused, match="inside `with use"):
        mmpeft.tunings(model)["a"].detach()
    leave.set()
    thread.join()
    mmpeft.tunings(model)["a"].detach()
    with pytest.raises(ConfigError, match="no tuning named 'a'"):
        mmpeft.use(model, "a")

    def change(module: nn.Module, args: object) -> None:
        mmpeft.tunings(model)["b"].detach()

    handle = model.blocks[0].register_forward_pre_hook(change)
    with pytest.raises(Refused, match="its own forward pass"):
        model(X)
    handle.remove()
    assert set(mmpeft.tunings(model)) == {"b", "c", "d"}


def test_a_choice_inside_a_pass_holds_there() -> None:
    model, answers = tuned()
    seen: list[bool] = []

    def teacher(module: nn.Module, args: object) -> None:
        if not seen:
            seen.append(False)
            with mmpeft.use(model, None):
                seen[0] = right(model, answers[None])

    handle = model.blocks[1].register_forward_pre_hook(teacher)
    with mmpeft.use(model, "a"):
        assert right(model, answers["a"])
    handle.remove()
    assert seen == [True]


@pytest.mark.parametrize("names", [["a", "b"], [None, "c"]])
def test_rows_in_threads(names) -> None:
    model, answers = tuned()
    wrong = []

    def work(rows: list[str | None]) -> None:
        for _ in range(20):
            with torch.no_grad(), mmpeft.use(model, rows):
                y = model(X)
            for i, name in enumerate(rows):
                if not torch.allclose(y[i], answers[name][i], atol=1e-5):
                    wrong.append(rows)

    threads = [threading.Thread(target=work, args=(own,)) for own in (names, names[::-1], ["b", "b"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""Plain DDP and FSDP2 in two gloo processes, started once for all checks."""

from __future__ import annotations

import copy
import datetime
import json
import pickle
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mmpeft
from mmpeft.errors import MMPEFTError
from tests.compat.models import ALL, bend, causal, close, images, near, plain, untouched, vit, words
from tests.compat.rows import row

BATCH = 4
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(test: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[test.__name__.strip("_")] = test
    return test


def _tuned(method: Any = None) -> tuple[Any, Any, Any]:
    """`(model, tuning, plain model of the same answers)`, equal in both processes."""
    torch.manual_seed(0)
    model = vit()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, method or mmpeft.LoRA(rank=2, at=ALL)))
    return model, tuning, plain(tuning, before)


def _half(x: Tensor) -> Tensor:
    return x.chunk(2)[dist.get_rank()]


def _loss(model: Any, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss /= 2
    return loss


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _alone(method: Any = None) -> tuple[dict[str, Tensor], Any]:
    """Gradients that one process finds on the whole batch."""
    model, tuning, _ = _tuned(method)
    _loss(model, images(BATCH)).backward()
    return {n: p.grad.clone() for n, p in tuning.named_parameters()}, model


def _same_gradients(tuning: Any, expected: dict[str, Tensor]) -> None:
    found = {n: _full(p.grad) for n, p in tuning.named_parameters()}
    assert list(found) == list(expected)
    for name, grad in expected.items():
        close(found[name], grad, 1e-5)


def _sharded(model: Any, **options: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


# -- DDP ----------------------------------------------------------------------------------------------------------


def _ddp(**options: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model, tuning, expected = _tuned()
    wrapped = DistributedDataParallel(model, **options)
    close(wrapped(_half(images(BATCH))), expected(_half(images(BATCH))))
    for _ in range(2):  # a static graph shows itself in the second step
        model.zero_grad()
        _loss(wrapped, _half(images(BATCH))).backward()
    _same_gradients(tuning, _alone()[0])


@check
def _ddp_gradients(folder: Path) -> None:
    _ddp()
    _ddp(static_graph=True)
    _ddp(find_unused_parameters=True)
    _ddp(gradient_as_bucket_view=True)


@check
def _ddp_with_recomputation(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    for mode in ("block", "pointwise"):
        model, tuning, _ = _tuned()
        tuning.recompute = mode
        wrapped = DistributedDataParallel(model)
        _loss(wrapped, _half(images(BATCH))).backward()
        _same_gradients(tuning, _alone()[0])


@check
def _ddp_switch_and_save(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model, tuning, expected = _tuned()
    wrapped = DistributedDataParallel(model)
    _loss(wrapped, _half(images(BATCH))).backward()
    with mmpeft.use(model, None), torch.no_grad():
        assert not torch.allclose(wrapped(images()), expected(images()))
    close(wrapped(images()), expected(images()))
    tuning.merge()
    with torch.no_grad():
        close(wrapped(images()), expected(images()), 1e-4)
    tuning.unmerge()
    copied = pickle.loads(pickle.dumps(wrapped.module))
    close(copied(images()), expected(images()))
    close(copy.deepcopy(wrapped.module)(images()), expected(images()))
    with pytest.raises(MMPEFTError):
        mmpeft.attach(wrapped, mmpeft.LoRA(rank=2), name="late")


@check
def _ddp_language_model(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = causal()
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL)))
    twin = copy.deepcopy(model)
    whole = words(BATCH)
    twin(input_ids=whole, labels=whole).loss.backward()
    wrapped = DistributedDataParallel(model)
    half = whole.chunk(2)[dist.get_rank()]
    out = wrapped(input_ids=half, labels=half)
    close(out.loss, plain(tuning, before)(input_ids=half, labels=half).loss)
    out.loss.backward()
    grads = {n: p.grad for n, p in mmpeft.tunings(twin)["default"].named_parameters()}
    _same_gradients(tuning, grads)


# -- FSDP2 ----------------------------------------------------------------------------------------------------------


@check
def _shard_after_attach(folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    model, tuning, expected = _tuned()
    _sharded(model)
    assert isinstance(model, FSDPModule)
    assert isinstance(model.blocks[0], FSDPModule)
    close(model(images()), expected(images()))
    _loss(model, _half(images(BATCH))).backward()
    _same_gradients(tuning, _alone()[0])
    assert all(p.grad is None for n, p in model.named_parameters() if "mmpeft" not in n)


@check
def _sharded_steps(folder: Path) -> None:
    _, single = _alone()
    lone = mmpeft.tunings(single)["default"]
    model, tuning, _ = _tuned()
    _sharded(model)
    ours, theirs = (torch.optim.AdamW(t.parameters(), lr=1e-2) for t in (tuning, lone))
    for step in range(3):
        for optimizer, one, x in ((ours, model, _half(images(BATCH, step))), (theirs, single, images(BATCH, step))):
            optimizer.zero_grad()
            _loss(one, x).backward()
            optimizer.step()
    for (name, got), right in zip(tuning.named_parameters(), lone.parameters(), strict=True):
        assert (_full(got.detach()) - right).abs().max() < 1e-4, name


@check
def _sharded_with_recomputation(folder: Path) -> None:
    for mode in ("block", "pointwise"):
        model, tuning, _ = _tuned()
        tuning.recompute = mode
        _sharded(model)
        _loss(model, _half(images(BATCH))).backward()
        _same_gradients(tuning, _alone()[0])


@check
def _switch_after_sharding(folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    torch.manual_seed(0)
    model = vit()
    before = untouched(model)
    one = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.*"), name="one"))
    two = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at="mlp.*"), name="two"))
    first, second = plain(one, before), plain(two, before)
    _sharded(model)
    close(model(images()), second(images()))
    with one.use():
        close(model(images()), first(images()))
        with mmpeft.use(model, None):
            close(model(images()), before(images()))
    with mmpeft.use(model, ["one", "two", None, "one"]):
        mixed = model(images(4))
    for i, right in enumerate((first, second, before, first)):
        close(mixed[i], right(images(4))[i], 1e-4)
    one.use()
    _loss(model, _half(images(BATCH))).backward()
    assert all(p.grad is not None for p in one.parameters())
    assert isinstance(model, FSDPModule)


@check
def _attach_after_sharding(folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    torch.manual_seed(0)
    model = vit()
    _sharded(model)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(MMPEFTError, match=r"attach first, then shard"):
        mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL))
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model, FSDPModule)
    _loss(model, _half(images(BATCH))).backward()


@check
def _second_attach_after_sharding(folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    model, _, expected = _tuned()
    _sharded(model)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(MMPEFTError, match=r"(?i)shard"):
        mmpeft.attach(model, mmpeft.LoRA(rank=2, at=ALL), name="late")
    assert [type(m) for m in model.modules()] == classes
    assert isinstance(model, FSDPModule)
    close(model(images()), expected(images()))


@check
def _detach_after_sharding(folder: Path) -> None:
    """Right, with the sharding as it was, or refused with the model as it was."""
    from torch.distributed.fsdp import FSDPModule

    model, tuning, expected = _tuned()
    base = vit()
    _sharded(model)
    try:
        tuning.detach()
    except MMPEFTError as error:
        assert re.search("(?i)shard", str(error)), error  # noqa: PT017
        close(model(images()), expected(images()))
    else:
        close(model(images()), base(images()))
    assert isinstance(model, FSDPModule)
    assert isinstance(model.blocks[0], FSDPModule)


@check
def _merge_after_sharding(folder: Path) -> None:
    model, tuning, expected = _tuned()
    _sharded(model)
    close(model(images()), expected(images()))
    try:
        tuning.merge()
    except MMPEFTError as error:
        assert re.search("(?i)shard", str(error)), error  # noqa: PT017
    else:
        close(model(images()), expected(images()), 1e-4)
        tuning.unmerge()
    close(model(images()), expected(images()))
    _loss(model, _half(images(BATCH))).backward()
    _same_gradients(tuning, _alone()[0])


@check
def _files_of_a_sharded_model(folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model, tuning, _ = _tuned()
    right = {n: t.clone() for n, t in model.state_dict().items()}
    own = {n: t.clone() for n, t in tuning.state_dict().items()}
    _sharded(model)
    model(images())
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert sorted(gathered) == sorted(right)
        for name, tensor in right.items():
            assert torch.equal(gathered[name], tensor), name
    values = {name: tensor * 2 for name, tensor in right.items()}
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
    for name, tensor in tuning.state_dict().items():
        assert torch.equal(_full(tensor), own[name] * 2), name
    set_model_state_dict(model, right, options=StateDictOptions(full_state_dict=True))
    where = folder / f"adapter_{dist.get_rank()}"
    try:
        tuning.save(where)
    except MMPEFTError as error:
        assert re.search("(?i)shard", str(error)), error  # noqa: PT017
        return
    fresh = vit()
    back = mmpeft.load(fresh, where)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, own[name]), name


@check
def _copies_and_sharding(folder: Path) -> None:
    model, _, expected = _tuned()
    copied = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    for one in (copied, model, again):
        _sharded(one)
        close(one(images()), expected(images()))
        own = mmpeft.tunings(one)["default"]
        _loss(one, _half(images(BATCH))).backward()
        _same_gradients(own, _alone()[0])


@check
def _sharded_copies(folder: Path) -> None:
    """What torch itself says of a copy and a pickle of a sharded model is what is said here."""

    def attempt(model: Any, act: Callable[[Any], Any]) -> str:
        try:
            act(model)
        except Exception as error:
            return type(error).__name__
        return ""

    untuned, model = vit(), _tuned()[0]
    for one in (untuned, model):
        _sharded(one)
        one(images())
    for act in (copy.deepcopy, pickle.dumps):
        got, right = attempt(model, act), attempt(untuned, act)
        assert bool(got) == bool(right), (act, got, right)


@check
def _mixed_precision_of_shards(folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, tuning, expected = _tuned()
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    _sharded(model, **policy)
    _sharded(expected, **policy)
    got, right = model(images()), expected(images())
    near(got, right)
    _loss(model, _half(images(BATCH))).backward()
    alone, _ = _alone()
    for parameter in tuning.parameters():
        assert parameter.grad.dtype == parameter.dtype
    found = torch.cat([_full(p.grad).flatten() for p in tuning.parameters()])
    near(found, torch.cat([alone[name].flatten() for name, _ in tuning.named_parameters()]), 0.1)


@check
def _weights_read_directly_are_sharded(folder: Path) -> None:
    """A backbone that reads its weights itself: the sharded weight is gathered when it is read."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from tests.matrix.families import FAMILIES

    example = FAMILIES["beit"]()
    model = example.model
    before = untouched(model)
    tuning = bend(mmpeft.attach(model, mmpeft.LoRA(rank=2, at="attn.*")))
    expected = plain(tuning, before)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    close(model(example.batch), expected(example.batch), 1e-4)
    model(example.batch).sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())


def _worker(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
    results = {}
    for name in names:
        try:
            own = folder / name
            own.mkdir(exist_ok=True)
            CHECKS[name](own)
            results[name] = ""
        except BaseException:  # every failure is some check's result
            results[name] = traceback.format_exc()
        (folder / f"results{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """What each of two processes, started once for all checks of the day, has found."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = [name for name in CHECKS if any(spec is not None and name in spec.params.values() for spec in callspecs)]
    _tuned(), causal()  # what these import, both processes then have
    folder = tmp_path_factory.mktemp("two")
    context = torch.multiprocessing.start_processes(
        _worker, args=(folder, names), nprocs=2, join=False, start_method="fork"
    )
    context.join(timeout=120)
    for process in context.processes:
        if process.is_alive():
            process.kill()
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in (0, 1)]


@row(
    "torch",
    "DDP in two processes: gradients, static graph, recomputation, switching, merge, copies, pickles, a language model",
    "the gradients of one process on the whole batch; attaching to the wrapper is refused",
)
@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("ddp")])
def test_ddp(name: str, results: list[dict[str, str]]) -> None:
    for rank, found in enumerate(results):
        assert name in found, f"process {rank} did not reach it"
        assert not found[name], f"process {rank}: {found[name]}"


@row(
    "torch",
    "FSDP2 in two processes: attach, then `fully_shard`; switching, merge, detach, files, copies, bf16",
    "the answers and gradients of one process; attaching to a sharded model is refused with the order to use",
)
@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith("ddp")])
def test_fully_shard(name: str, results: list[dict[str, str]]) -> None:
    for rank, found in enumerate(results):
        assert name in found, f"process {rank} did not reach it"
        assert not found[name], f"process {rank}: {found[name]}"

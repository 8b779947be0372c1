"""Loading is a function of (seed, epoch, index): for any workers, any number of processes, and after any kill."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import TensorDataset

from mmpeft.data.loading import DataModule
from mmpeft.data.sampling import EpochSampler, ResumableLoader, Seeded, hash_seed
from mmpeft.errors import ConfigError, DataError


def noisy(sample: tuple[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample and random numbers drawn beside it."""
    return sample[0], torch.rand(2)


class Numbers(DataModule):
    """The numbers 0 … n-1 with noise."""

    def __init__(self, count: int = 23, **options: Any) -> None:
        super().__init__(**{"batch_size": 4, **options})
        self.count = count
        self.train_transform = noisy

    def datasets(self, stage: str | None = None) -> None:
        self.train_set = self.val_set = self.test_set = self.predict_set = TensorDataset(torch.arange(self.count))


def loader(count: int = 23, rank: int = 0, world: int = 1, part: str = "train", **options: Any) -> ResumableLoader:
    data = Numbers(count, **options)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world, "rank": rank})  # type: ignore[assignment]
    data.setup()
    return getattr(data, f"{part}_dataloader")()


def epoch(found: ResumableLoader, number: int) -> list[Any]:
    found.sampler.set_epoch(number)
    return list(found)


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


# -- one sample ---------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    data = TensorDataset(torch.arange(5))
    one = Seeded(data, noisy, 3)
    first = one[(2, 4)][1]
    torch.manual_seed(9)
    assert torch.equal(one[(2, 4)][1], first)
    for other in (Seeded(data, noisy, 4)[(2, 4)], one[(3, 4)], one[(2, 3)]):
        assert not torch.equal(other[1], first)
    assert torch.equal(one[1][1], one[(0, 1)][1])


def test_reading_leaves_the_global_generators_alone():
    before, python = torch.get_rng_state(), random.getstate()
    for part in ("train", "val", "predict"):
        list(loader(part=part))
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_mix_is_fixed_and_spreads():
    assert hash_seed(0) == 0xE220A8397B1DCDAF >> 1  # the published first output of splitmix64 from state 0
    assert len({hash_seed(seed, e, i) for seed in range(10) for e in range(10) for i in range(100)}) == 10_000
    assert hash_seed(1, 2) != hash_seed(2, 1)
    assert all(0 <= hash_seed(-1, i) < 2**63 for i in range(100))


# -- one epoch ----------------------------------------------------------------------------------------------


def test_each_epoch_is_another_order_of_all_samples():
    found = loader()
    orders = [torch.cat([batch[0] for batch in epoch(found, number)]).tolist() for number in range(2)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(23))
    assert len(found) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_workers(workers):
    alone, several = loader(), loader(num_workers=workers)
    for number in (0, 1):
        assert_same(epoch(alone, number), epoch(several, number))


@pytest.mark.parametrize("part", ["val", "test", "predict"])
def test_evaluation_is_in_order(part):
    found = loader(part=part, eval_batch_size=10)
    assert [len(batch[0]) for batch in found] == [10, 10, 3]
    assert torch.cat([batch[0] for batch in found]).tolist() == list(range(23))


# -- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2], ids=["resumed-alone", "resumed-with-workers"])
@pytest.mark.parametrize("before", [0, 2], ids=["saved-alone", "saved-with-workers"])
@pytest.mark.parametrize("consumed", [0, 1, 4, 6])
def test_a_new_loader_continues_with_the_next_unseen_batch(before, after, consumed):
    whole = [batch for number in (3, 4) for batch in epoch(loader(), number)]
    first = loader(num_workers=before)
    first.sampler.set_epoch(3)
    batches = iter(first)
    seen = [next(batches) for _ in range(consumed)]
    state = first.state_dict()
    second = loader(num_workers=after)
    second.load_state_dict(state)
    assert second.state_dict() == state  # saved again before the first batch
    rest = list(second)
    if consumed == 6:  # the epoch was over: this is the next one
        assert second.sampler.epoch == 4
        assert_same(seen + rest, whole)
    else:
        assert_same(seen + rest + epoch(second, 4), whole)


def test_an_epoch_other_than_the_saved_one_starts_at_its_first_batch():
    """Lightning ends an epoch early with `limit_train_batches`; what it left is not owed in the next one."""
    first = loader()
    batches = iter(first)
    next(batches)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert_same(epoch(second, 1), epoch(loader(), 1))


@pytest.mark.parametrize(
    ("change", "what"), [({"batch_size": 5}, "global_batch"), ({"seed": 1}, "seed"), ({"count": 24}, "samples")]
)
def test_a_position_in_other_data_is_refused(change, what):
    first = loader()
    batches = iter(first)
    next(batches)
    with pytest.raises(DataError, match=what):
        loader(**change).load_state_dict(first.state_dict())
    loader(**change).load_state_dict(loader().state_dict())  # between epochs nothing is lost


# -- several processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "world"), [(24, 2), (23, 2), (23, 3), (2, 3)])
def test_training_global_batches_are_those_of_one_process(count, world):
    alone = [set(batch[0].tolist()) for batch in epoch(loader(count, batch_size=4 * world), 1)]
    ranks = [epoch(loader(count, rank, world), 1) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    together = [set().union(*(batch[0].tolist() for batch in batches)) for batches in zip(*ranks)]
    assert set().union(*together) == set(range(count))
    assert together[:-1] == alone[:-1]
    assert together[-1] >= alone[-1]  # the last one is filled up from the start of the order


def test_resuming_in_several_processes():
    for rank in range(2):
        whole = epoch(loader(rank=rank, world=2), 0)
        saved = loader(rank=0, world=2)  # the checkpoint is written by the first process
        batches = iter(saved)
        _ = next(batches), next(batches)
        resumed = loader(rank=rank, world=2)
        resumed.load_state_dict(saved.state_dict())
        assert_same(list(resumed), whole[2:])


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_evaluation_sees_each_sample_once_in_equally_many_batches(world, batch):
    for count in range(world, 30):
        ranks = [list(loader(count, rank, world, "val", eval_batch_size=batch)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        seen = sorted(int(x) for batches in ranks for b in batches for x in b[0])
        assert seen == list(range(count))


def test_more_processes_than_samples_to_evaluate_are_refused():
    with pytest.raises(DataError, match="2 samples to evaluate on 3 processes"):
        loader(2, 0, 3, "val")


def test_lengths_of_samplers():
    for world in (1, 2, 5):
        for shuffle in (True, False):
            for rank in range(world):
                sampler = EpochSampler(13, shuffle=shuffle, num_replicas=world, rank=rank)
                assert len(list(sampler)) == len(sampler)


# -- under Lightning ----------------------------------------------------------------------------------------


class Recorder(lightning.LightningModule):
    """Keeps every batch it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch[0].tolist(), float(batch[1].sum())))
        return self.weight.sum()

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Writes a checkpoint after the given number of steps, then leaves as a killed run would."""

    def __init__(self, path: Any, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def fit(folder: Any, workers: int, limit: float, callbacks: list[Callback], path: Any = None) -> Recorder:
    module = Recorder()
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=folder,
        limit_train_batches=limit,
        callbacks=callbacks,
        **quiet,
    )
    try:
        trainer.fit(module, datamodule=Numbers(12, num_workers=workers), ckpt_path=path, weights_only=True)
    except InterruptedError:
        assert callbacks
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("workers", "limit"), [(0, 1.0), (2, 1.0), (0, 2)], ids=["alone", "workers", "limited"])
def test_lightning_resumes_with_the_next_unseen_batch(tmp_path, workers, limit):
    whole = fit(tmp_path, workers, limit, []).seen
    assert len(whole) == (9 if limit == 1.0 else 6)
    for step in range(1, len(whole)) if workers == 0 else (2, 3):
        path = tmp_path / f"{step}.ckpt"
        before = fit(tmp_path, workers, limit, [SaveAt(path, step)]).seen
        after = fit(tmp_path, workers, limit, [], path).seen
        assert before + after == whole


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"eval_batch_size": 0}, {"batch_size": 2.5}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Numbers(**options)


def test_missing_sets():
    data = DataModule()
    data.setup()
    with pytest.raises(DataError, match="no training samples"):
        data.train_dataloader()
    with pytest.raises(DataError, match="nothing to predict"):
        data.predict_dataloader()
    with pytest.raises(DataError, match="no test samples"):
        data.test_dataloader()
    assert data.val_dataloader() == []

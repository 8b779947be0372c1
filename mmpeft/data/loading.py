"""`DataModule`: what the data modules of all domains build on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning
import torch
from torch import distributed
from torch.utils.data import DataLoader

from mmpeft.data.options import inherit_options
from mmpeft.data.sampling import EpochSampler, ResumableLoader, Seeded, SizedDataset
from mmpeft.errors import ConfigError, DataError


<<<<<<< HEAD
=======
@runtime_checkable
class SizedDataset(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def hash_seed(*numbers: int) -> int:
    """Hash integers into one 63-bit seed (splitmix64), independent of any random number generator."""
    state = 0
    for number in numbers:
        state = (state + (number & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class Seeded(Dataset[Any]):
    """Wrap a data set so that the random transform of a sample depends on `(seed, epoch, index)` only.

    Only torch's CPU generator is seeded (all of torchvision v2 draws from it), and it is restored afterwards.
    The index is an integer (epoch 0) or the pair `(epoch, index)` that `EpochSampler` yields.
    """

    def __init__(self, dataset: SizedDataset, transform: Callable[[Any], Any] | None = None, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        """Return one sample, transformed under its own random seed."""
        epoch, row = index if isinstance(index, tuple) else (0, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash_seed(self.seed, epoch, row))
            sample = self.dataset[row]
            return sample if self.transform is None else self.transform(sample)


class EpochSampler(DistributedSampler[Any]):
    """Yield `(epoch, index)` for one rank: every W-th entry of an order that depends on `(seed, epoch)` only.

    With `shuffle` the order is padded from its own start to a multiple of W, so that all ranks step equally often;
    without it nothing is repeated. Lightning leaves samplers of this type alone and calls `set_epoch`.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        rows: Any = range(length)  # of a data set only the length is asked for
        super().__init__(rows, num_replicas, rank, shuffle=shuffle, seed=seed)
        self.length = length
        self.skip = 0  # samples of this rank to leave out, once

    def __len__(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        share, rest = divmod(self.length, self.num_replicas)
        return share + (bool(rest) if self.shuffle else self.rank < rest)

    def order(self) -> list[int]:
        """Return the indices of the current epoch for all ranks."""
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        short = len(self) * self.num_replicas - self.length
        return order + (order * -(-short // max(self.length, 1)))[:short]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the pairs of the current epoch."""
        skip, self.skip = self.skip, 0
        epoch = self.epoch
        for index in self.order()[self.rank :: self.num_replicas][skip:]:
            yield epoch, index

    def identity(self) -> dict[str, int]:
        """Return what must be equal for a position in an epoch to mean the same samples."""
        return {"samples": self.length, "seed": self.seed}


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that remembers how many batches were consumed; its sampler is an `EpochSampler`.

    Lightning stores `state_dict()` in its checkpoints and hands it back on resume. Because samples depend on
    `(seed, epoch, index)` only, the state is independent of `num_workers` and of how far workers had read ahead.
    """

    _resume: tuple[int, int] | None = None  # (epoch, batches already consumed)
    _consumed = 0
    _last_epoch: int | None = None  # epoch of the last iterator, None before the first

    def _identity(self) -> dict[str, int]:
        """Return the sampler's identity and the number of samples in a batch of all ranks."""
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        return {**sampler.identity(), "global_batch": int(self.batch_size or 1) * sampler.num_replicas}

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, the batches of it already consumed, and what they were cut from."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        epoch, batch = self._position()
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def _position(self) -> tuple[int, int]:
        """Return `(epoch, batches consumed)`; a finished epoch is the start of the next one."""
        if self._resume is not None:
            return self._resume
        assert isinstance(self.sampler, EpochSampler)
        if self._last_epoch is None:
            return self.sampler.epoch, 0
        if self._consumed >= len(self):
            return self._last_epoch + 1, 0
        return self._last_epoch, self._consumed

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch after the last one consumed.

        Raises:
            DataError: in the middle of an epoch, the data, the global batch size or the seed are others.
        """
        if not state or not isinstance(self.sampler, EpochSampler):
            return
        for key, now in self._identity().items():
            then = state.get(key)
            if state["batch"] and then != now:
                raise DataError(
                    f"The checkpoint was written in the middle of epoch {state['epoch']} with {key}={then}, but "
                    f"the data module now has {key}={now}: the unseen samples are not defined. Resume with the same "
                    "data, seed and batch_size × number of processes, or from a checkpoint at the end of an epoch."
                )
        self._resume = (state["epoch"], state["batch"])
        self.sampler.set_epoch(state["epoch"])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, which torch's iterator type is not
        """Yield batches. The position is read at the first `next`, after Lightning has set the epoch."""
        sampler, start = self.sampler, 0
        if isinstance(sampler, EpochSampler):
            if self._resume is not None and self._resume[0] == sampler.epoch:
                start = self._resume[1]
            sampler.skip = start * int(self.batch_size or 1)
            self._last_epoch = sampler.epoch
        self._resume = None
        self._consumed = start
        for batch in super().__iter__():
            self._consumed += 1
            yield batch


>>>>>>> h/surface
class DataModule(lightning.LightningDataModule):
    """Base of the data modules: subclasses fill the data sets, this class builds the loaders.

    A subclass overrides `datasets(stage)`, which sets any of `train_set`, `val_set`, `test_set`, `predict_set`
    (map-style) and of `train_transform`, `eval_transform`, `predict_transform` (a function of one sample), and may set
    `collate`.
    """

    small_batch: ClassVar[int | None] = None
    """Samples in an evaluation step by default, for data whose samples are small."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        inherit_options(cls)

    def __init__(
        self, batch_size: int = 64, num_workers: int = 0, seed: int = 0, eval_batch_size: int | None = None
    ) -> None:
        """
        Args:
            batch_size: samples a training step and process.
            num_workers: loading processes; the batches do not depend on it.
            seed: of the order and of random transforms.
            eval_batch_size: samples a validation, test or prediction step; None for as many as suits the data: 256
                small images, else `batch_size`.

        Raises:
            ConfigError: a value is out of its range.
        """
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(
                    f"Expected `{name}` of {type(self).__name__} to be an integer >= {least}, but got {value!r}."
                )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.eval_batch_size = eval_batch_size or self.small_batch or batch_size
        self.train_set: SizedDataset | None = None
        self.val_set: SizedDataset | None = None
        self.test_set: SizedDataset | None = None
        self.predict_set: SizedDataset | None = None
        self.train_transform: Callable[[Any], Any] | None = None
        self.eval_transform: Callable[[Any], Any] | None = None
        self.predict_transform: Callable[[Any], Any] | None = None
        self.collate: Callable[[list[Any]], Any] | None = None
        self._lent: SizedDataset | None = None

    def datasets(self, stage: str | None = None) -> None:
        """Set the data sets that `stage` ("fit", "validate", "test", "predict" or None for all) needs."""

    def setup(self, stage: str | None = None) -> None:
        """Lightning's hook: fill the data sets."""
        self.lend(None)
        self.datasets(stage)

    def lend(self, samples: SizedDataset | None) -> None:
        """Train on these samples, as they are, in the place of `train_set`: until the next `setup`, or None."""
        self._lent = samples

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled, resumable training batches."""
        if self.train_set is None or len(self.train_set) == 0:
            raise DataError(
                f"{type(self).__name__} has no training samples; check its split arguments, and call setup('fit') "
                "first when no Trainer does."
            )
        if self._lent is not None:
            return self._loader(self._lent, None, self.batch_size, shuffle=True)
        return self._loader(self.train_set, self.train_transform, self.batch_size, shuffle=True)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the validation batches in order, or an empty list when there is no validation set."""
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Return the test batches in order.

        Raises:
            DataError: there is no test set.
        """
        found = self._eval_loader(self.test_set)
        if not found:
            raise DataError(f"{type(self).__name__} has no test samples; name some where it is configured")
        return found

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches to predict, in order; Lightning splits them between processes itself."""
        if self.predict_set is None or len(self.predict_set) == 0:
            raise DataError(f"{type(self).__name__} has nothing to predict; give it inputs for prediction.")
        transform = self.predict_transform or self.eval_transform
        return DataLoader(
            Seeded(self.predict_set, transform, self.seed),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _eval_loader(self, dataset: SizedDataset | None) -> ResumableLoader | list[ResumableLoader]:
        if dataset is None or len(dataset) == 0:
            return []
        return self._loader(dataset, self.eval_transform, self.eval_batch_size, shuffle=False)

    def _loader(
        self, dataset: SizedDataset, transform: Callable[[Any], Any] | None, batch_size: int, *, shuffle: bool
    ) -> ResumableLoader:
        replicas, _ = self._replicas()
        share, rest = divmod(len(dataset), replicas)
        if not shuffle and not share:
            raise DataError(
                f"{len(dataset)} samples to evaluate on {replicas} processes: some would have none; use fewer processes"
            )
        if not shuffle and rest:
            # Some ranks hold one sample more: a size that divides `share` would give them one batch more and hang
            # the others in a collective call. The next fitting size keeps the metrics exact, without repeated samples.
            sizes = (*range(batch_size, 1, -1), *range(batch_size + 1, share + 2))
            batch_size = next(size for size in sizes if share % size)
        return ResumableLoader(
            Seeded(dataset, transform, self.seed),
            batch_size=batch_size,
            sampler=self._sampler(dataset, batch_size, shuffle=shuffle),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the global one
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def _sampler(self, dataset: SizedDataset, batch_size: int, *, shuffle: bool) -> EpochSampler:
        """Return the order of a data set; what a subclass overrides whose batches cannot be of any samples."""
        replicas, rank = self._replicas()
        return EpochSampler(len(dataset), shuffle=shuffle, seed=self.seed, num_replicas=replicas, rank=rank)

    def _replicas(self) -> tuple[int, int]:
        """Return (number of data-parallel processes, own rank): the Trainer's word first, then torch's."""
        given = getattr(self.trainer, "distributed_sampler_kwargs", None) if self.trainer is not None else None
        if given:
            return int(given["num_replicas"]), int(given["rank"])
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_world_size(), distributed.get_rank()
        return 1, 0

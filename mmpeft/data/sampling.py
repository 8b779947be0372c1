"""Deterministic, resumable order: what a sample is depends on `(seed, epoch, index)` and on nothing else.

So the same run gives the same batches for any number of workers, and the state of a loader is two integers: a run
killed in the middle of an epoch resumes with the next unseen batch, bit for bit. Under DDP each rank takes every W-th
sample of one shuffled order, so the global batch is the same set of samples as one process with W times the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mmpeft.errors import DataError
from mmpeft.types import Sample, Transform, Untyped


@runtime_checkable
class SizedDataset(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def hash_seed(*numbers: int) -> int:
    """Hash integers into one 63-bit seed (splitmix64), independent of any random number generator."""
    state = 0
    for number in numbers:
        state = (state + (number & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class Seeded(Dataset[Sample]):
    """Wrap a data set so that the random transform of a sample depends on `(seed, epoch, index)` only.

    Only torch's CPU generator is seeded (all of torchvision v2 draws from it), and it is restored afterwards.
    The index is an integer (epoch 0) or the pair `(epoch, index)` that `EpochSampler` yields.
    """

    def __init__(self, dataset: SizedDataset, transform: Transform | None = None, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        """Return one sample, transformed under its own random seed."""
        epoch, row = index if isinstance(index, tuple) else (0, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash_seed(self.seed, epoch, row))
            sample = self.dataset[row]
            return sample if self.transform is None else self.transform(sample)


class EpochSampler(DistributedSampler[Sample]):
    """Yield `(epoch, index)` for one rank: every W-th entry of an order that depends on `(seed, epoch)` only.

    With `shuffle` the order is padded from its own start to a multiple of W, so that all ranks step equally often;
    without it nothing is repeated. Lightning leaves samplers of this type alone and calls `set_epoch`.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        rows: Untyped = range(length)  # of a data set only the length is asked for
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


class ResumableLoader(DataLoader[Sample]):
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

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]  # a generator, which torch's iterator type is not
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

"""`DataModule`: what the data modules of all domains build on."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import lightning
import torch
from torch import distributed
from torch.utils.data import DataLoader

from mmpeft.data.inputs import Inputs
from mmpeft.data.options import inherit_options
from mmpeft.data.sampling import EpochSampler, ResumableLoader, Seeded, SizedDataset
from mmpeft.errors import ConfigError, DataError
from mmpeft.types import Argument, Batch, Sample, Transform


class DataModule(lightning.LightningDataModule):
    """Base of the data modules: subclasses fill the data sets, this class builds the loaders.

    A subclass overrides `datasets(stage)`, which sets any of `train_set`, `val_set`, `test_set`, `predict_set`
    (map-style) and of `train_transform`, `eval_transform`, `predict_transform` (a function of one sample), and may set
    `collate`.
    """

    inputs: Inputs | None = None
    """What is to be predicted in place of the data's own."""

    small_batch: ClassVar[int | None] = None
    """Samples in an evaluation step by default, for data whose samples are small."""

    def __init_subclass__(cls, **options: Argument) -> None:
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
        self.train_transform: Transform | None = None
        self.eval_transform: Transform | None = None
        self.predict_transform: Transform | None = None
        self.collate: Callable[[list[Sample]], Batch] | None = None
        self._lent: SizedDataset | None = None

    def datasets(self, stage: str | None = None) -> None:
        """Set the data sets that `stage` ("fit", "validate", "test", "predict" or None for all) needs."""

    def setup(self, stage: str | None = None) -> None:
        """Lightning's hook: fill the data sets."""
        self.lend(None)
        self.datasets(stage)
        if self.inputs is not None and stage in ("predict", None):
            self.take(self.inputs)

    def take(self, inputs: Inputs) -> None:
        """Set `predict_set` to what a user gave.

        Raises:
            ConfigError: these data have no place for inputs of somebody's own.
            DataError: an input is missing or cannot be read.
        """
        raise ConfigError(f"{type(self).__name__} predicts its own samples alone; it has no `take` for inputs of yours")

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

    def predict_dataloader(self) -> DataLoader[Sample]:
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
        self, dataset: SizedDataset, transform: Transform | None, batch_size: int, *, shuffle: bool
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

"""Tones of four pitches in noise."""

from typing import Any, Unpack

import torch
from torch.utils.data import TensorDataset

from mmpeft.data.loading import DataModule
from mmpeft.data.options import LoadingOptions


class ToneData(DataModule):
    """Batches `(waves float [B, 64], labels int64 [B])`."""

    def __init__(self, samples: int = 64, **options: Unpack[LoadingOptions]) -> None:
        """
        Args:
            samples: in the training set.
            options: those of `DataModule`.
        """
        super().__init__(**options)
        self.samples, self.classes = samples, ["low", "middle", "high", "highest"]

    def datasets(self, stage: str | None = None) -> None:
        self.train_set, self.val_set, self.test_set = (self._drawn(seed) for seed in range(3))
        waves = self.test_set.tensors[0]
        self.predict_set: Any = [(wave, f"tone {i}") for i, wave in enumerate(waves)]

    def _drawn(self, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(self.samples) % 4
        pitch = 2.0 ** (labels + 1)
        phase = 6.3 * torch.rand(self.samples, 1, generator=generator)
        waves = torch.sin(pitch[:, None] * torch.linspace(0, 6.3, 64) + phase)
        return TensorDataset(waves + 0.2 * torch.randn(waves.shape, generator=generator), labels)

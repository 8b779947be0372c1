"""Features that are computed once, where nothing in the image tower trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning import LightningDataModule
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.sites import sites
from mmpeft.tuning import Tuning

AT_ONCE = 64


class CachedViews(Dataset[tuple[Tensor, int]]):
    """Unit features of several augmented views of each image, [views, n, d]; a sample is one view, drawn anew.

    `images` are the samples that they are the features of.
    """

    def __init__(self, views: Tensor, labels: Tensor, images: object) -> None:
        self.views, self.labels, self.images = views, labels, images

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return `(features [d], label)`."""
        view = int(torch.randint(len(self.views), ()))
        return self.views[view, index], int(self.labels[index])

    @staticmethod
    @torch.no_grad()
    def compute(
        encode: Callable[[Tensor], Tensor], data: LightningDataModule, views: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Features [views, n, d] and labels [n] of a data module's training images, augmented as for training."""
        samples = data.train_dataloader().dataset  # seeded by (epoch, row)
        rows, labels, found = range(len(samples)), dict[int, int](), list[Tensor]()
        parts = [(view, rows[at : at + AT_ONCE]) for view in range(views) for at in rows[::AT_ONCE]]
        for view, part in track(parts, "features", transient=True, disable=len(parts) < 8):
            images = []
            for row in part:
                image, labels[row] = samples[view, row]
                images.append(image)
            found.append(encode(torch.stack(images).to(device)))
        features = torch.cat(found)
        return features.view(views, len(rows), -1), torch.tensor([int(labels[row]) for row in rows])


def tuned_towers(tuning: Tuning) -> set[str]:
    """Towers in whose modules parts of a tuning enter; the empty name stands for what is outside both."""
    towers = {site.path: site.tower for site in sites(tuning.model) if site.tower}

    def of(path: str) -> str:
        above = path
        while above and above not in towers:
            above = above.rpartition(".")[0]
        if above:
            return towers[above]
        inside = {tower for other, tower in towers.items() if other.startswith(f"{path}.")}
        return inside.pop() if path and len(inside) == 1 else ""

    return {of(hook.path) for placed in tuning.placements for hook in placed.hooks}

"""RanPAC (arXiv:2307.02251)."""

from __future__ import annotations

import mmpeft
from mmpeft.bank import RidgeHead
from mmpeft.methods.base import Method
from mmpeft.vision.continual.methods.first_task import FirstTask


class RanPAC(FirstTask):
    """Ridge regression on `relu(φ R)`, R random of `size` columns; any method tunes φ on the first task only."""

    default = mmpeft.AdaptFormer()

    def __init__(self, method: Method | None = None, size: int = 2000, seed: int = 0) -> None:
        """
        Args:
            method: what is tuned on the first task; None for AdaptFormer.
            size: random features (10,000 in the paper; memory is its square).
            seed: of the random features.
        """
        super().__init__(method)
        self.size, self.seed = size, seed

    def closed_form(self) -> RidgeHead:
        return RidgeHead(self.width, size=self.size, seed=self.seed)

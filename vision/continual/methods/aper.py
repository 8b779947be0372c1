"""APER, formerly ADAM (arXiv:2303.07338)."""

from __future__ import annotations

import mmpeft
from mmpeft.bank import PrototypeHead
from mmpeft.bank.bank import Rows
from mmpeft.vision.continual.methods.first_task import FirstTask


class APER(FirstTask):
    """Class means of `[φ_base; φ_tuned]`; any method tunes φ on the first task only."""

    default = mmpeft.AdaptFormer()

    def routes(self) -> list[Rows]:
        return [None, "first"]

    def closed_form(self) -> PrototypeHead:
        return PrototypeHead(2 * self.width)

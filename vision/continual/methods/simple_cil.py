"""SimpleCIL (arXiv:2303.07338): class means of the frozen backbone."""

from __future__ import annotations

from mmpeft.bank import PrototypeHead
from mmpeft.vision.continual.methods.first_task import FirstTask


class SimpleCIL(FirstTask):
    """`cos(φ(x), mean φ of the class)`: trains nothing, and its last accuracy does not depend on the increment."""

    def __init__(self) -> None:
        super().__init__()

    def closed_form(self) -> PrototypeHead:
        return PrototypeHead(self.width)

"""What libraries say that is no news for a run: advertisements, and warnings of parts that the run does not use."""

from __future__ import annotations

import logging
import os
import warnings

NO_NEWS = {
    "lightning.pytorch.utilities.rank_zero": ("💡", "TPU available", "GPU available: False", "Restoring states from"),
    "lightning.fabric.utilities.rank_zero": ("💡",),
    "lightning.fabric.utilities.seed": ("Seed set to",),
    "torch.utils._pytree": ("<enum",),
    "bitsandbytes.cextension": ("Failed to load CPU",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao`",),
}
"""Beginnings of messages by the logger that says them."""
WARNINGS = (
    "LightningCLI's args parameter",
    "Total length of .* across ranks is zero",
    ".*isinstance\\(treespec, LeafSpec\\)",
    "Precision .* is not supported by the model summary",
    ".*does not have many workers which may be a bottleneck",
)
"""About arguments that we pass on, a validation set that was left out on purpose, and libraries' own code."""


class _Silence(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip().startswith(self.beginnings)


def quieten() -> None:
    """Keep what is no news from the terminal; errors and warnings about the run itself are shown."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name, beginnings in NO_NEWS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Silence) for known in logger.filters):
            logger.addFilter(_Silence(beginnings))
    for said in WARNINGS:
        warnings.filterwarnings("ignore", said)

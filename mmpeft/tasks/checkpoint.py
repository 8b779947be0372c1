"""Checkpoint files: whole or absent, and of tensors and plain data only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from mmpeft.errors import CheckpointError
from mmpeft.files import check_file, write_atomic
from mmpeft.types import StateDict

MOST_BYTES = 2**46


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through a temporary file and a rename; reads tensors and plain data only, never code."""

    def save_checkpoint(self, checkpoint: StateDict, path: _PATH, storage_options: object = None) -> None:
        """Write a checkpoint; the former file at `path` is whole until the new one is.

        Raises:
            MMPEFTError: the disk is full or not writable.
        """
        if "://" in str(path):  # object stores put whole files anyway
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None) -> StateDict:
        """Read a checkpoint.

        Raises:
            CheckpointError: missing, truncated, or it holds objects that only unpickling code could make.
        """
        if "://" not in str(path):
            if not Path(path).exists():
                raise CheckpointError(f"no checkpoint at {path}; give the path of a .ckpt file, or `last`")
            check_file(Path(path), MOST_BYTES, CheckpointError)
        safe = True if weights_only is None else weights_only
        try:
            found: StateDict = super().load_checkpoint(path, map_location, weights_only=safe)
        except Exception as error:  # torch's reader of pickles raises whatever damaged data lead to
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"{path} is no whole checkpoint of plain tensors and data: {reason}") from error
        handed_over = Path(path).name == ".temp.ckpt"  # bare weights, from Lightning's own forked processes
        if not handed_over and (not isinstance(found, dict) or "state_dict" not in found):
            raise CheckpointError(f"{path} is a torch file, but no checkpoint of a training run")
        return found

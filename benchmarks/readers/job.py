"""One file for one reader, and what passes between the process that asks and the one that reads."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A file, the model that it is for, and where its reader's answer goes.

    `base` holds the model's tensors by component and diffusers' path, `unet.conv_in.weight`; `configs` the
    configurations of its components. The answer is the tensors as the reader changed them, under the same names.
    """

    kind: str
    format: str
    method: str
    file: str
    base: str
    configs: dict[str, dict[str, Any]]
    out: str


class NotTried(Exception):
    """A reader that cannot be tried on such a file here, and why."""


def write(jobs: list[Job], path: Path) -> None:
    path.write_text(json.dumps([asdict(job) for job in jobs]))


def answer(read: Callable[[Job, Tensors, Tensors], Tensors]) -> None:
    """Read every job of `sys.argv[1]` by `read(job, base, file)`; what it raises is the reader's refusal."""
    from safetensors.torch import load_file, save_file

    for facts in json.loads(Path(sys.argv[1]).read_text()):
        job = Job(**facts)
        base = load_file(job.base)
        try:
            changed = read(job, base, load_file(job.file))
            assert set(changed) <= set(base), f"tensors that no model has: {sorted(set(changed) - set(base))[:3]}"
            save_file({name: tensor.detach().clone().contiguous() for name, tensor in changed.items()}, job.out)
        except NotTried as error:
            Path(job.out).with_suffix(".txt").write_text(f"not tried: {error}")
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            Path(job.out).with_suffix(".txt").write_text(f"refused: {type(error).__name__} {first[:80]}".strip())
            Path(job.out).with_suffix(".log").write_text(traceback.format_exc())

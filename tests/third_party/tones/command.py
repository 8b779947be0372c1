"""`mmpeft hear RUN`: what a trained run takes the test's tones for."""

import sys
from collections.abc import Sequence

import torch

from mmpeft.run.reload import load_run


def main(argv: Sequence[str] | None = None) -> int:
    (folder,) = list(sys.argv[1:] if argv is None else argv)[1:]
    task, data = load_run(folder)
    with torch.no_grad():
        found = [task.classes[int(i)] for waves, _ in data.test_dataloader() for i in task(waves).argmax(1)]
    print(", ".join(found))
    return 0

"""`mmpeft ask`: ask a trained run about a picture of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.training.run import load_run
from mmpeft.training.transforms import evaluation
from mmpeft.vla.backbone import check_length, preprocessing
from mmpeft.vla.data.captions import read
from mmpeft.vla.vqa.picture import answered
from mmpeft.vla.vqa.task import VisualQuestions


def main(argv: Sequence[str] | None = None) -> int:
    """Print the likeliest answers; write the picture with the question and the first of them."""
    parser = argparse.ArgumentParser("mmpeft ask", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run of VisualQuestions: its folder or a .ckpt file"
    )
    parser.add_argument("--image", type=Path, required=True, help="the picture")
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument("--top", type=int, default=3, help="answers to print (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("answered.png"), help="picture to write (default: %(default)s)"
    )
    options = parser.parse_args((sys.argv[1:] if argv is None else list(argv))[1:])
    picture = read(options.image)
    task, _ = load_run(options.checkpoint)
    if not isinstance(task, VisualQuestions):
        raise ConfigError(f"{options.checkpoint} is a run of {type(task).__name__}, ask wants one of VisualQuestions")
    assert task.tokenizer is not None
    check_length([options.question], task.tokenizer)
    (size, _), mean, std = preprocessing(task.model)
    transform: Any = evaluation(size, mean, std)
    with torch.no_grad():
        scores = task(transform(picture)[None].to(task.device), [options.question]).softmax(1)[0].cpu()
    values, best = scores.topk(min(options.top, len(scores)))
    for value, number in zip(values.tolist(), best.tolist()):
        print(f"{task.answers[number]}  {value:.2f}")
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    write_atomic(options.out, answered(image, [(options.question, "", task.answers[int(best[0])])]))
    print(f"picture: {options.out}")
    return 0

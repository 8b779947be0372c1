"""`mmpeft ask`: ask a trained run about a picture of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmpeft.data.pictures import read
from mmpeft.data.transforms import evaluation
from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.run.reload import load_run
from mmpeft.types import AnyFunc
from mmpeft.vla.backbone import check_length, preprocessing
from mmpeft.vla.vqa.data import OfQuestions, QuestionData
from mmpeft.vla.vqa.draw import answered
from mmpeft.vla.vqa.task import VisualQuestions


def run(options: argparse.Namespace) -> int:
    """Print the likeliest answers to each question; write the picture with its questions and answers."""
    picture = read(options.image)
    task, data = load_run(options.checkpoint)
    if not isinstance(task, VisualQuestions):
        raise ConfigError(f"{options.checkpoint} is a run of {type(task).__name__}, ask wants one of VisualQuestions")
    probabilities = ask(task, picture, options.question, data)
    count = min(options.top, len(task.answers))
    table = Table("question", *(f"{rank + 1}." for rank in range(count)))
    for question, row in zip(options.question, probabilities):
        best = row.topk(count)
        table.add_row(
            question, *(f"{task.answers[i]} {v:.2f}" for v, i in zip(best.values.tolist(), best.indices.tolist()))
        )
    Console().print(table)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    lines = [(q, "", task.answers[int(row.argmax())]) for q, row in zip(options.question, probabilities)]
    write_atomic(options.out, answered([image] * len(lines), lines))
    print(f"picture: {options.out}")
    return 0


@torch.no_grad()
def ask(task: VisualQuestions, picture: Image.Image, questions: Sequence[str], data: object = None) -> torch.Tensor:
    """Probabilities [Q, A] of the answers to questions about one picture, prepared as the run's data prepare theirs.

    Raises:
        DataError: a question is longer than the text tower's context.
    """
    check_length(questions, task.tokenizer)
    wanted = preprocessing(task.model)
    prepare: AnyFunc = evaluation(*wanted, wanted.resizing)
    if isinstance(data, QuestionData) and isinstance(data.eval_transform, OfQuestions):
        prepare = data.eval_transform.transform
    image = prepare(picture)[None].to(task.device)
    scores: torch.Tensor = task(image, questions, torch.zeros(len(questions), dtype=torch.long, device=task.device))
    return (scores.sigmoid() if task.soft else scores.softmax(1)).cpu()

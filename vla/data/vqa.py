"""Images with questions and answers: composed scenes, and files in the layout of VQAv2."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError, DataError
from mmpeft.training.data import DataModule
from mmpeft.training.image_data import FALLBACK_MEAN, FALLBACK_STD
from mmpeft.training.transforms import evaluation
from mmpeft.vla.backbone import check_length
from mmpeft.vla.data.captions import read
from mmpeft.vla.data.questions import ANSWERS, KINDS, TYPES, Grammar

HELD_BACK = 6
"""Every sixth training identity of a kind is for validation."""

Sample = tuple[Any, str, Tensor, int]


class QuestionData(DataModule):
    """Batches `(images float [B, 3, S, S], questions: B strings, scores float [B, A], types int64 [B])`.

    `scores` says how right each of the `answers` is, 1 for the true one; `types` are numbers of `types`' names.
    """

    answers: list[str]
    types: list[str]

    def __init__(self, batch_size: int, num_workers: int, seed: int, image_size: int, eval_batch_size: int) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size)
        self.image_size, self.collate = image_size, collate
        self.configure(image_size, FALLBACK_MEAN, FALLBACK_STD)

    def configure(self, image_size: int | Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        """Take the normalisation of the backbone; images keep the size that was asked for."""
        self.train_transform = self.eval_transform = OfImage(evaluation(self.image_size, mean, std))

    def check(self, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        """Raise DataError for a question that a tokenizer would cut."""


class OfImage:
    """Apply a transform to the image of `(image, question, scores, type)`."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        """Return the transformed sample."""
        return self.transform(sample[0]), *sample[1:]


def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Images [B, 3, S, S], questions, scores [B, A] and types [B]."""
    images, texts, scores, types = zip(*samples)
    return torch.stack(images), list(texts), torch.stack(scores), torch.tensor(types)


class Asked(Dataset[Sample]):
    """Questions about scenes, types in turn; made anew whenever one is read."""

    def __init__(self, grammar: Grammar, length: int) -> None:
        self.grammar, self.length = grammar, length

    def __len__(self) -> int:
        """Return the number of questions in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Return a uint8 image, a question, scores of all answers, and the number of its type."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        kind = index % len(TYPES)
        found = self.grammar.ask(TYPES[kind], generator)
        scores = torch.zeros(len(ANSWERS))
        scores[ANSWERS.index(found.answer)] = 1
        return found.scene.image, found.text, scores, kind


class SceneQuestionData(QuestionData):
    """Questions of five types about composed OpenMoji scenes; test scenes are of identities no training saw."""

    def __init__(
        self,
        style: str = "openmoji",
        questions: int = 4000,
        eval_questions: int = 1000,
        image_size: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        """Args:
        style: `openmoji`, `noto` or `twemoji`.
        questions: training questions an epoch; each is new.
        eval_questions: questions for validation and for the test; always the same.
        image_size: height and width in pixels.
        batch_size: questions a training step and process.
        num_workers: loading processes; the batches do not depend on it.
        seed: of the training questions.
        eval_batch_size: questions a validation or test step.
        """
        super().__init__(batch_size, num_workers, seed, image_size, eval_batch_size)
        self.style, self.questions, self.eval_questions = style, questions, eval_questions
        self.answers, self.types = list(ANSWERS), list(TYPES)

    def datasets(self, stage: str | None = None) -> None:
        """Set the three sets of questions."""
        known, held_out = emoji(self.style, "train"), emoji(self.style, "test")

        def rows(sets: Any) -> list[list[int]]:
            numbers = (sets.subcategories.index(kind) for kind in KINDS.values())
            return [torch.nonzero(sets.sublabels == number).flatten().tolist() for number in numbers]

        train = [[row for i, row in enumerate(own) if i % HELD_BACK] for own in rows(known)]
        val = [own[::HELD_BACK] for own in rows(known)]
        self.train_set = Asked(Grammar(known, train, self.image_size), self.questions)
        self.val_set = Asked(Grammar(known, val, self.image_size), self.eval_questions)
        self.test_set = Asked(Grammar(held_out, rows(held_out), self.image_size), self.eval_questions)


class Annotated(Dataset[Sample]):
    """Questions of a VQAv2 file with the annotators' answers; those with no known answer are left out."""

    def __init__(self, items: Sequence[dict[str, Any]], answers: Sequence[str], types: Sequence[str]) -> None:
        self.numbers = {answer: i for i, answer in enumerate(answers)}
        self.types = {name: i for i, name in enumerate(types)}
        self.items = [item for item in items if any(a in self.numbers for a in item["answers"])]

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        """Return an image, a question, scores `min(n / 3, 1)` for n annotators, and the number of its type."""
        item = self.items[index]
        scores = torch.zeros(len(self.numbers))
        for answer, count in Counter(item["answers"]).items():
            if answer in self.numbers:
                scores[self.numbers[answer]] = min(count / 3, 1.0)
        return read(item["image"]), item["question"], scores, self.types[item["type"]]


class VQAData(QuestionData):
    """VQAv2's files: `questions.json`, `annotations.json` and a folder of images, for training, validation and test."""

    def __init__(
        self,
        root: str,
        image_name: str = "{split}/images/{image_id}.jpg",
        vocabulary: int = 1000,
        image_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        """Args:
        root: folder with `train`, `val` and `test` (or some of them), each with the two files.
        image_name: where an image is below `root`; `{image_id:012d}` pads the number as COCO does.
        vocabulary: the most frequent training answers that can be given.
        image_size: height and width that images are resized to.
        batch_size: questions a training step and process.
        num_workers: loading processes; the batches do not depend on it.
        seed: of the order.
        eval_batch_size: questions a validation or test step.

        Raises:
            DataError: a file is missing or has other keys, or a question has no image or no answer.
        """
        super().__init__(batch_size, num_workers, seed, image_size, eval_batch_size)
        if vocabulary < 2:
            raise ConfigError(f"vocabulary is a number of answers >= 2, got {vocabulary}")
        self.root = Path(root)
        self.items = {
            s: items_of(self.root, s, image_name) for s in ("train", "val", "test") if (self.root / s).is_dir()
        }
        if "train" not in self.items:
            raise DataError(f"{self.root} has no folder `train` with questions.json and annotations.json")
        count = Counter(answer for item in self.items["train"] for answer in set(item["answers"]))
        self.answers = [answer for answer, _ in count.most_common(vocabulary)]
        self.types = sorted({item["type"] for items in self.items.values() for item in items})

    def datasets(self, stage: str | None = None) -> None:
        """Set the sets that are there.

        Raises:
            DataError: no question of a set can be answered with the vocabulary.
        """
        for name, items in self.items.items():
            found = Annotated(items, self.answers, self.types)
            if not len(found):
                raise DataError(f"no question of {self.root / name} has one of the {len(self.answers)} answers")
            setattr(self, f"{name}_set", found)

    def check(self, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        """Raise DataError for a question that a tokenizer would cut."""
        check_length([item["question"] for items in self.items.values() for item in items], tokens)


def items_of(root: Path, split: str, image_name: str) -> list[dict[str, Any]]:
    """Questions of a split with their answers, types and image files.

    Raises:
        DataError: as `VQAData` says.
    """
    asked, said = (_entries(root / split / f"{name}.json", name) for name in ("questions", "annotations"))
    answers = {}
    for entry in said:
        try:
            given = [str(a["answer"]).lower() for a in entry["answers"]]
            answers[entry["question_id"]] = (given, str(entry.get("question_type", "all")))
        except (KeyError, TypeError) as error:
            raise DataError(f"an annotation in {root / split} has no {error}: {str(entry)[:80]}") from error
    found = []
    for entry in asked:
        try:
            number, question = entry["question_id"], str(entry["question"])
            image = root / image_name.format(split=split, image_id=entry["image_id"])
        except (KeyError, ValueError) as error:
            raise DataError(f"a question in {root / split} has no {error}: {str(entry)[:80]}") from error
        if not answers.get(number, ([], ""))[0]:
            raise DataError(f"question {number} in {root / split} has no answer in annotations.json")
        if not image.is_file():
            raise DataError(f"question {number} in {root / split} is about {image}, which does not exist")
        given, kind = answers[number]
        found.append({"question": question, "image": image, "answers": given, "type": kind})
    return found


def _entries(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no VQAv2 file with the key {name!r}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: {name!r} must be a list with entries")
    return entries

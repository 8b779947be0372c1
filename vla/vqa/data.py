"""Images with questions and answers: composed scenes, and files in the layout of VQAv2."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Unpack, get_args, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmpeft.data.contract import Preprocessed, Preprocessing, Resize, Resizing
from mmpeft.data.folders import split_folders
from mmpeft.data.inputs import Inputs
from mmpeft.data.loading import DataModule
from mmpeft.data.options import LoaderOptions, LoadingOptions
from mmpeft.data.pictures import read
from mmpeft.data.sampling import hash_seed
from mmpeft.data.texts import cleaned, read_text
from mmpeft.data.transforms import evaluation
from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError, DataError
from mmpeft.types import Json
from mmpeft.vla.backbone import check_length
from mmpeft.vla.vqa.questions import ANSWERS, TYPES, Grammar

AGREED = 3
"""Annotators of VQAv2 whose agreement makes an answer fully right."""


class Asked(NamedTuple):
    """Q questions about B images; as a sample of a data set, about one image [3, H, W] that may be a picture still."""

    images: Any  # float [B, 3, S, S]
    questions: list[str]
    owner: Tensor  # int64 [Q], which image
    scores: Tensor  # float [Q, A], how right each answer is, 1 for the true one
    types: Tensor  # int64 [Q], number of the type's name
    ids: list[str]


@runtime_checkable
class HasAnswers(Protocol):
    """Data that name the answers to choose from and the types of questions, and say whether several may be right."""

    answers: Sequence[str]
    types: Sequence[str]
    soft: bool


class QuestionData(Preprocessed, DataModule):
    """Batches `Asked`; `answers` and `types` are names, `soft` says that several answers may be right to a degree."""

    answers: list[str]
    types: list[str]
    soft = False
    resize: Resize | None = None  # how pictures of another shape are shown; None for the backbone's own way

    def __init__(self, image_size: int, **options: Unpack[LoadingOptions]) -> None:
        super().__init__(**options)
        self.collate = collate
        self.preprocess(Preprocessing((image_size, image_size)))

    def preprocess(self, wanted: Preprocessing) -> None:
        """Take size and normalisation of the backbone, whose position embeddings know one size only."""
        self.image_size = wanted.size[-1]
        resizing = wanted.resizing if self.resize is None else Resizing(self.resize, wanted.resizing.interpolation)
        self.train_transform = self.eval_transform = OfQuestions(
            evaluation(wanted.size, wanted.mean, wanted.std, resizing)
        )

    def take(self, inputs: Inputs) -> None:
        """Ask every text about every picture.

        Raises:
            DataError: there are no texts.
        """
        questions = list(inputs.texts)
        if not questions:
            raise DataError("what is to be asked? mmpeft predict RUN PICTURE… --text 'is there a cat?'")
        none = torch.zeros(len(questions), dtype=torch.long)
        scores = torch.zeros(len(questions), len(self.answers))
        named = inputs.named()
        self.predict_set = Questioned(
            list(named.values()),
            [Asked(None, questions, none, scores, none, [name] * len(questions)) for name in named],
        )

    def check_texts(self, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        """Raise DataError for a question that a tokenizer would cut."""


class Questioned(Dataset[Asked]):
    """Questions about picture files, which are read when they are asked for."""

    def __init__(self, paths: Sequence[Path], asked: Sequence[Asked]) -> None:
        self.paths, self.asked = paths, asked

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Asked:
        """Return one picture with its questions."""
        return self.asked[index]._replace(images=read(self.paths[index]))


class OfQuestions:
    """Apply a transform to the image of a sample."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, sample: Asked) -> Asked:
        """Return the transformed sample."""
        return sample._replace(images=self.transform(sample.images))


def collate(samples: Sequence[Asked]) -> Asked:
    """One batch of samples; `owner` counts through its images."""
    return Asked(
        torch.stack([s.images for s in samples]),
        [question for s in samples for question in s.questions],
        torch.cat([s.owner + row for row, s in enumerate(samples)]),
        torch.cat([s.scores for s in samples]),
        torch.cat([s.types for s in samples]),
        [name for s in samples for name in s.ids],
    )


class AskedScenes(Dataset[Asked]):
    """Scenes with their questions, made when they are read by torch's random state, which the loader seeds.

    `salt` keeps the same seed from giving the scenes of two sets the same places, colours and kinds.
    """

    def __init__(self, grammar: Grammar, length: int, salt: int) -> None:
        self.grammar, self.length, self.salt = grammar, length, salt

    def __len__(self) -> int:
        """Return the number of scenes in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> Asked:
        """Return one scene, uint8 [3, S, S], with its questions."""
        seed = hash_seed(self.salt, int(torch.randint(2**62, ())))
        scene, questions = self.grammar.ask(torch.Generator().manual_seed(seed))
        scores = torch.zeros(len(questions), len(ANSWERS))
        for row, question in zip(scores, questions):
            row[ANSWERS.index(question.answer)] = 1
        types = torch.tensor([TYPES.index(q.type) for q in questions])
        ids = [f"{index}.{number}" for number in range(len(questions))]
        return Asked(scene.image, [q.text for q in questions], torch.zeros_like(types), scores, types, ids)


class SceneQuestionData(QuestionData):
    """Questions of five types about composed scenes; those of validation and test are of emoji no training shows."""

    small_batch = 32

    def __init__(
        self,
        style: str = "openmoji",
        scenes: int = 2000,
        eval_scenes: int = 500,
        image_size: int = 128,
        batch_size: int = 16,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """
        Args:
            style: `openmoji`, `noto` or `twemoji`.
            scenes: training scenes an epoch, each new, with about twelve questions.
            eval_scenes: scenes for validation, and for the test; always the same for a seed.
            image_size: height and width in pixels of the scenes.
            batch_size: scenes a training step and process.
            options: those of `DataModule`; `seed` is of the scenes and the questions too.

        Raises:
            ConfigError: a number of scenes below 1.
        """
        super().__init__(image_size, batch_size=batch_size, **options)
        for name, value in (("scenes", scenes), ("eval_scenes", eval_scenes)):
            if value < 1:
                raise ConfigError(f"{name} is a number of scenes >= 1, got {value}")
        self.style, self.scenes, self.eval_scenes, self.scene_size = style, scenes, eval_scenes, image_size
        self.answers, self.types = list(ANSWERS), list(TYPES)

    def datasets(self, stage: str | None = None) -> None:
        """Set the three sets of scenes, each with the emoji of its own split."""
        counts = {"train": self.scenes, "val": self.eval_scenes, "test": self.eval_scenes}
        for salt, (name, count) in enumerate(counts.items()):
            grammar = Grammar(emoji(self.style, name), self.scene_size)
            setattr(self, f"{name}_set", AskedScenes(grammar, count, salt))
        self.predict_set = self.test_set


class Annotated(Dataset[Asked]):
    """Questions of VQAv2 files, with the annotators' answers where there are any."""

    def __init__(self, items: Sequence[Json], answers: Sequence[str], types: Sequence[str]) -> None:
        self.items = list(items)
        self.numbers = {answer: i for i, answer in enumerate(answers)}
        self.types = {name: i for i, name in enumerate(types)}

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.items)

    def __getitem__(self, index: int) -> Asked:
        """Return one picture with one question; scores are `min(n / 3, 1)` for n annotators."""
        item = self.items[index]
        scores = torch.zeros(1, len(self.numbers))
        given: Counter[str] = Counter(item["answers"])
        for answer, count in given.items():
            if answer in self.numbers:
                scores[0, self.numbers[answer]] = min(count / AGREED, 1.0)
        kind = torch.tensor([self.types.get(item["type"], 0)])
        picture = read(item["image"])
        return Asked(picture, [item["question"]], torch.zeros_like(kind), scores, kind, [str(item["id"])])


class VQAData(QuestionData):
    """Questions about images in VQAv2's layout.

    A folder with `train`, `val`, `test` and `predict`, or some of them, each with `questions.json`,
    `annotations.json` (not for `predict`) and images.

    Answers are the most frequent ones of training. Training leaves out questions that none of them answers; validation
    and test keep them, and count them as wrong.
    """

    soft = True
    small_batch = 64

    def __init__(
        self,
        root: str,
        image_name: str = "{split}/images/{image_id}.jpg",
        vocabulary: int = 1000,
        image_size: int = 224,
        batch_size: int = 32,
        resize: Resize | None = None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """
        Args:
            root: the folder.
            image_name: where an image is below `root`; `{image_id:012d}` pads the number as COCO does.
            vocabulary: how many answers can be given at most.
            image_size: height and width that images are resized to, unless the backbone says otherwise.
            batch_size: questions a training step and process.
            resize: how pictures of another shape are shown: `squash`, `shortest` (the middle is cut out) or `longest`
                (borders are added); None for the backbone's own way.
            options: those of `DataModule`.

        Raises:
            ConfigError: a vocabulary below two answers.
            DataError: a file is missing or has other keys, a question has no image or no annotation, or no question of
                a set is answered by the vocabulary.
        """
        if resize not in (None, *get_args(Resize)):
            raise ConfigError(f"resize is one of {', '.join(get_args(Resize))}, got {resize!r}")
        self.resize = resize
        super().__init__(image_size, batch_size=batch_size, **options)
        if vocabulary < 2:
            raise ConfigError(f"vocabulary is a number of answers >= 2, got {vocabulary}")
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"there is no folder {self.root}")
        found = {role: folder.name for role, folder in split_folders(self.root).items() if folder.parent == self.root}
        found |= {"predict": "predict"} if (self.root / "predict").is_dir() else {}
        if "train" not in found:
            raise DataError(f"{self.root} has no folder `train` with questions.json and annotations.json")
        self.items = {split: items_of(self.root, name, image_name) for split, name in found.items()}
        count = Counter(answer for item in self.items["train"] for answer in set(item["answers"]))
        # equally frequent answers by name: the vocabulary must not depend on the order of the questions
        self.answers = sorted(count, key=lambda answer: (-count[answer], answer))[:vocabulary]
        if len(self.answers) < 2:
            raise DataError(
                f"all questions of {self.root / found['train']} have one answer, {self.answers[0]!r}: nothing to learn"
            )
        self.types = sorted({item["type"] for s, items in self.items.items() if s != "predict" for item in items})
        known = set(self.answers)
        for split, items in self.items.items():
            answered = [item for item in items if known.intersection(item["answers"])]
            if split != "predict" and not answered:
                raise DataError(
                    f"no question of {self.root / split} has one of the {len(known)} answers of training: "
                    f"{sorted(known)[:3]} …; its first question is {items[0]['question']!r}"
                )
            if split == "train":
                self.items[split] = answered

    def datasets(self, stage: str | None = None) -> None:
        """Set the sets that are there; without a folder `predict`, the test questions are predicted."""
        for split, items in self.items.items():
            setattr(self, f"{split}_set", Annotated(items, self.answers, self.types))
        self.predict_set = self.predict_set or self.test_set

    def check_texts(self, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        """Raise DataError for a question that a tokenizer would cut."""
        check_length([item["question"] for items in self.items.values() for item in items], tokens)


def items_of(root: Path, split: str, image_name: str) -> list[Json]:
    """Questions of a split with their answers, types and image files.

    Raises:
        DataError: as `VQAData` says.
    """
    answers: dict[object, tuple[list[str], str]] = {}
    for entry in _entries(root / split, "annotations") if split != "predict" else []:
        try:
            given = [cleaned(str(a["answer"])).lower() for a in entry["answers"]]
            answers[entry["question_id"]] = (given, str(entry.get("question_type", "all")))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"an annotation in {root / split} lacks {error}: {str(entry)[:80]}") from error
    found = []
    for entry in _entries(root / split, "questions"):
        try:
            number, question = entry["question_id"], cleaned(str(entry["question"]))
            image = root / image_name.format(split=split, image_id=entry["image_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a question in {root / split} lacks {error}: {str(entry)[:80]}") from error
        given, kind = answers.get(number, ([], "all"))
        if split != "predict" and not given:
            raise DataError(f"question {number} in {root / split} has no answer in annotations.json")
        if not image.is_file():
            raise DataError(
                f"question {number} in {root / split} is about {image}, which does not exist; `image_name` is "
                f"{image_name!r}"
            )
        found.append({"id": number, "question": question, "image": image, "answers": given, "type": kind})
    return found


def _entries(folder: Path, name: str) -> list[Json]:
    path = folder / f"{name}.json"
    try:
        entries = json.loads(read_text(path).removeprefix("\ufeff"))[name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no VQAv2 file with the key {name!r}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: {name!r} must be a list with entries")
    return entries

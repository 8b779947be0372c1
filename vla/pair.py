"""What the tasks on an image-text pair share: the pair, its tokenizer, and how it wants its images."""

from __future__ import annotations

from typing import Protocol, Unpack, runtime_checkable

from torch import nn

from mmpeft.data.contract import Preprocessing, configure
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Frozen
from mmpeft.tasks.options import TrainingOptions
from mmpeft.tasks.task import Task
from mmpeft.vla.backbone import ImageTextPair, Tokenizer, create, preprocessing, tokenizer, towers_of


class PairOptions(TrainingOptions, total=False):
    """Options of `PairTask`, which explains them."""

    pretrained: bool
    image_size: int | None


@runtime_checkable
class HasTexts(Protocol):
    """Data with texts, which it refuses where the tokenizer would cut one."""

    def check_texts(self, tokens: Tokenizer, /) -> None: ...


class PairTask(Task):
    """A task on an image-text pair of open_clip."""

    preprocessing: Preprocessing
    tokenizer: Tokenizer

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        pretrained: bool = True,
        image_size: int | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        """
        Args:
            backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
            method: what is trained of the towers and how; none for what a task adds behind them alone.
            pretrained: whether to load the pair's weights.
            image_size: height and width in pixels; None for the pair's own.
            options: those of `TuningModule`.
        """
        super().__init__(method or Frozen(), train_head=False, **options)
        self.backbone, self.pretrained, self.image_size = backbone, pretrained, image_size

    def build(self) -> nn.Module:
        pair = create(self.backbone, self.pretrained, self.image_size)
        self.tokenizer = tokenizer(self.backbone)
        self.preprocessing = preprocessing(pair)
        data = self.datamodule
        configure(data, self.preprocessing)
        if isinstance(data, HasTexts):
            data.check_texts(self.tokenizer)
        return pair

    @property
    def towers(self) -> ImageTextPair:
        """The pair with the types that open_clip does not give."""
        assert self.model is not None
        return towers_of(self.model)

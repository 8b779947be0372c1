"""Contrastive tuning of an image-text pair on images and their texts; retrieval both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Unpack

import torch
from lightning.pytorch.callbacks import Callback
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, distributed, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.checkpoint import checkpoint

from mmpeft.errors import ConfigError
from mmpeft.hosting.modules import CHILD
from mmpeft.methods import Full
from mmpeft.methods.base import Method
from mmpeft.tasks.predictions import class_file
from mmpeft.types import Batch, Facts, Fields
from mmpeft.vla.backbone import ImageTextPair, towers_of
from mmpeft.vla.pair import PairOptions, PairTask

RANKS = (1, 5, 10)
MAX_SCALE = 100.0
SCALES = ("logit_scale", "logit_bias")
BIAS = -10.0
"""Of SigLIP at its start."""


class ContrastiveTuner(PairTask):
    """Adapts an image-text pair to captions: `L = ½ (CE(s f gᵀ) + CE(s g fᵀ))`, or SigLIP's sigmoid loss.

    Batches are `(images float [B, 3, H, W], texts: B strings, rows int64 [B])`; pairs of one row belong together, so
    that several captions of one image all count as right in retrieval.
    """

    monitor = ("val/image_to_text@1", "max")
    headline: ClassVar[Sequence[str] | None] = ("image_to_text@1", "text_to_image@1")

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        objective: Literal["clip", "siglip"] = "clip",
        micro_batch: int | None = None,
        tune_scale: bool = False,
        **options: Unpack[PairOptions],
    ) -> None:
        """
        Args:
            backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
            method: what is trained and how; the command line fills it from the key `method`.
            objective: `clip` (softmax over the batch) or `siglip` (sigmoid of every pair).
            micro_batch: images and texts encoded at a time. The loss sees the whole batch, memory one micro-batch:
                each is encoded again in the backward pass, with the same gradients as without.
            tune_scale: also train the logit scale and bias, clamped to a factor of 100 at most. They are in the
                adapter; one with a bias loads on a pair that has one (open_clip's `init_logit_bias`).
            options: those of `PairTask`.
        """
        if method is None and not tune_scale:
            raise ConfigError(
                "ContrastiveTuner trains nothing beside the pair: give a method such as mmpeft.LoRA(rank=8); on the "
                "command line: --method LoRA, or -c method/lora"
            )
        super().__init__(backbone, method, **options)
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch is a number of pairs >= 1, got {micro_batch}; leave it out for all at once")
        self.objective, self.micro_batch, self.tune_scale = objective, micro_batch, tune_scale
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def build(self) -> nn.Module:
        pair = super().build()
        towers = towers_of(pair)
        if self.tune_scale:
            if self.objective == "siglip" and towers.logit_bias is None:
                towers.logit_bias = nn.Parameter(torch.tensor(BIAS))
            self.method = self.method + Full(at="|".join(f"param & path={name}" for name in scales_of(towers)))
        return pair

    def _bias(self) -> Tensor:
        """SigLIP's bias: the pair's, or where it has none the one that SigLIP begins with, which then stays."""
        own = self.towers.logit_bias
        return torch.tensor(BIAS, device=self.device) if own is None else own

    def load_state_dict(self, state_dict: Facts, strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Set every trainable tensor; scales that older runs kept in the base are read as what they are."""
        former = {f"model.{name}": f"model.{CHILD}.default.full_{name}.value" for name in SCALES}
        found = {former.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(found if self.tune_scale else state_dict, strict, assign)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token numbers of texts on the model's device, int64 [B, context]."""
        self.prepare()
        return self.tokenizer(list(texts)).to(self.device)

    def encode(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts, [B, d] each."""
        self.prepare()
        towers = self.towers
        return towers.encode_image(images, normalize=True), towers.encode_text(tokens, normalize=True)

    def contrast(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The loss of a batch, encoded in micro-batches."""
        self.prepare()
        towers = self.towers
        size = self.micro_batch or len(images)
        parts = [
            self.encode(i, t) if size >= len(images) else checkpoint(self.encode, i, t, use_reentrant=False)
            for i, t in zip(images.split(size), tokens.split(size))
        ]
        image, text = (torch.cat(side).float() for side in zip(*parts))
        scale = towers.logit_scale.clamp(max=torch.tensor(MAX_SCALE).log().item()).exp()
        world = {"rank": self.global_rank, "world_size": self.trainer.world_size} if self._trainer else {}
        if self.objective == "siglip":
            loss: Tensor = SigLipLoss(**world)(image, text, scale, self._bias())
        else:
            loss = ClipLoss(local_loss=True, gather_with_grad=True, **world)(image, text, scale)
        return loss

    def loss(self, batch: tuple[Tensor, Sequence[str], Tensor], index: int) -> Tensor:
        images, texts, _ = batch
        loss = self.contrast(images, self.tokens(texts))
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(images))
        return loss

    def predict_step(self, batch: tuple[Tensor, Sequence[str], Tensor], index: int) -> Fields:
        """Paths of pictures, and how well each of the texts that were given fits: `softmax(s · f tᵀ)`.

        Raises:
            ConfigError: there are no texts to choose among.
        """
        images, paths, _ = batch
        texts = self.asked_texts()
        if not texts:
            raise ConfigError(
                "a pair predicts which of some texts fits: mmpeft predict RUN PICTURE… --text 'a cat' 'a dog'"
            )
        image, text = self.encode(images, self.tokens(texts))
        scores = self.towers.logit_scale.exp() * image @ text.T
        return {"id": list(paths), "probabilities": scores.float().softmax(-1).cpu()}

    def configure_callbacks(self) -> list[Callback]:
        return [*super().configure_callbacks(), class_file("predictions.csv", self.asked_texts)]

    def evaluate(self, batch: Batch, stage: str) -> None:
        images, texts, rows = batch
        image, text = (side.float().cpu() for side in self.encode(images, self.tokens(texts)))
        self._kept.append((image, text, rows.cpu()))

    def results(self, stage: str) -> Mapping[str, Tensor]:
        own = tuple(torch.cat(side) for side in zip(*self._kept))
        self._kept = []
        every = [own]
        if distributed.is_available() and distributed.is_initialized():  # the nearest of all, not of a process's share
            every = [own] * distributed.get_world_size()
            distributed.all_gather_object(every, own)
        image, text, rows = (torch.cat(side) for side in zip(*every))
        return recall(image, text, rows)


def scales_of(pair: ImageTextPair) -> list[str]:
    """Names of the scale and the bias that a pair has."""
    return [name for name in SCALES if getattr(pair, name) is not None]


def recall(image: Tensor, text: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Share of queries that have a counterpart among the k nearest, both ways.

    Every image is there once, as a query and to be found, however many texts it has: for an image any of its texts
    counts, for a text its image.

    Args:
        image: unit features [n, d].
        text: unit features [n, d].
        rows: int64 [n], the image of each pair.
    """
    numbers, of = rows.unique(return_inverse=True)
    first = torch.full((len(numbers),), len(rows)).scatter_reduce(0, of, torch.arange(len(rows)), "amin")
    once, known = image[first], rows[first]
    found: dict[str, Tensor] = {}
    for name, query, asked, answer, there in (
        ("image_to_text", once, known, text, rows),
        ("text_to_image", text, rows, once, known),
    ):
        same = asked[:, None] == there[None]
        best = (query @ answer.t()).topk(min(max(RANKS), len(there)), dim=1).indices
        hit = same.gather(1, best).cumsum(1).clamp(max=1).float().mean(0)
        found |= {f"{name}@{k}": hit[min(k, len(hit)) - 1] for k in RANKS}
    return found

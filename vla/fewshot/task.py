"""Few-shot recognition with an image-text pair: learn base classes from a handful of images, name new ones as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmpeft.data.contract import HasClasses
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.parts.in_place import InPlace
from mmpeft.surgery.choice import use
from mmpeft.tasks.labels import check_labels
from mmpeft.tasks.metrics import Metrics
from mmpeft.tasks.predictions import class_file
from mmpeft.types import AnyModule, Facts, Fields
from mmpeft.vla.fewshot.consistency import Consistency
from mmpeft.vla.fewshot.features import CachedViews, tuned_towers
from mmpeft.vla.fewshot.heads import Head
from mmpeft.vla.fewshot.texts import ClassTexts
from mmpeft.vla.pair import PairOptions, PairTask


class FewShot(PairTask):
    """Adapts an image-text pair to the base classes of the data module; scores are `s f tᵀ` unless the head says else.

    What is known as CoOp, MaPLe or CLIP-LoRA is a method on the towers; CLIP-Adapter, Tip-Adapter, TaskRes or a linear
    probe is a head behind them; any method goes with any head. Where the image tower is left alone its features are
    computed once. Reported are accuracies of base images among base classes, of new images among new ones, and their
    harmonic mean.
    """

    monitor = ("val/base", "max")
    headline = ("base", "new", "harmonic")

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        head: Head | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        consistency: Consistency | None = None,
        views: int = 10,
        predictions: str = "predictions.csv",
        **options: Unpack[PairOptions],
    ) -> None:
        """
        Args:
            backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
            method: what is trained of the towers and how; none for heads that leave them alone.
            head: what is behind the towers; the plain zero-shot scores if left out.
            templates: texts around a class name; their features are averaged. Learned context replaces them.
            consistency: terms that hold the tuned features near the frozen ones (PromptSRC).
            views: augmented views of each training image that are kept where the image tower is frozen.
            predictions: file that `predict` writes, .csv or .jsonl, inside the run's folder unless absolute.
            options: those of `PairTask`.
        """
        super().__init__(backbone, method, **options)
        if views < 1:
            raise ConfigError(f"views is a number of augmented views >= 1, got {views}")
        self.templates, self.views, self.consistency = list(templates), views, consistency
        self.head, self.predictions = head or Head(), predictions
        self.classes: list[str] = []
        self.base = 0
        self.kept: CachedViews | None = None
        names = [f"{stage}_{kind}" for stage in ("val", "test") for kind in ("base", "new")]
        self.metrics: Metrics[MeanMetric] = Metrics({name: MeanMetric() for name in names})

    # -- towers, texts and head ------------------------------------------------------------------------------

    frozen_text: Tensor

    def build(self) -> nn.Module:
        data = self.data(HasClasses)
        if data is not None:
            self.classes = list(data.classes)
            self.base = int(getattr(data, "base", len(self.classes)))
        if not self.classes:
            raise ConfigError(f"{type(data).__name__} names no classes; FewShot needs their names")
        if data is not None and self.base < 2:
            raise ConfigError(
                f"{type(data).__name__} has {self.base} of {len(self.classes)} classes to learn from, expected two or "
                "more: nothing is to be told apart; raise base_share, or add classes"
            )
        return super().build()

    def start(self) -> None:
        assert self.tuning is not None
        pair: AnyModule = self.model
        self.tuned = tuned_towers(self.tuning)
        contexts = [p.part for p in self.tuning.placements if isinstance(p.part, InPlace)]
        if self.head.by_image and not contexts:
            raise ConfigError(f"{type(self.head).__name__} moves a learned context: give it the method CoOp")
        if self.head.keeps_features and self.tuned & {"image", ""}:
            raise ConfigError(
                f"{type(self.head).__name__} keeps features of the training images, which {self.method} would "
                "change: tune the text tower alone (at='text:…'), or take another head"
            )
        self.texts = ClassTexts(self.classes, self.templates, self.tokenizer, self.tuning)
        with torch.no_grad(), use(pair, None):
            plain = None if contexts else self.tuning
            frozen = ClassTexts(self.classes, self.templates, self.tokenizer, plain).encode(pair)
        self.register_buffer("frozen_text", frozen, persistent=False)
        self.head.start(frozen, self.base, contexts[0].tokens.shape[1] if contexts else 0)
        self.contexts = contexts
        self._keep_features()

    def _keep_features(self) -> None:
        """Compute the training features of a frozen image tower once, and let the head see them, before the optimiser
        asks what trains: the keys of a Tip-Adapter do."""
        data = self.datamodule
        if data is None or data.train_set is None or self.tuned & {"image", ""}:
            return
        device = self.trainer.strategy.root_device
        self.to(device)
        views, labels = CachedViews.compute(self.image_features, data, self.views, device)
        self.head.remember(F.normalize(views.mean(0), dim=-1), labels.to(device))
        self.kept = CachedViews(views.cpu(), labels, data.train_set)

    def configure_model(self) -> None:
        """Lightning's hook, called before any batch: train on the features that are kept of this run's images."""
        super().configure_model()
        data = self.datamodule
        if data is not None and self.kept is not None and self.kept.images is data.train_set:
            data.lend(self.kept)

    def teardown(self, stage: str) -> None:
        """Lightning's hook: others may train on the images themselves."""
        if self.datamodule is not None and self.kept is not None:
            self.datamodule.lend(None)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features [B, d]; features that were kept are passed on."""
        if images.dim() == 2:
            return images
        with torch.set_grad_enabled(torch.is_grad_enabled() and "image" in self.tuned):
            return self.towers.encode_image(images, normalize=True).float()

    def text_features(self, image: Tensor, classes: slice = slice(None)) -> Tensor:
        """Unit features of class names [C, d]; [B, C, d] where they depend on the image."""
        assert self.model is not None
        if not self.tuned & {"text", ""}:
            return self.frozen_text[classes]
        if not self.head.by_image:
            return self.texts.encode(self.model, classes).float()
        count = len(self.classes[classes])
        (context,) = self.contexts[:1]
        found = []
        for shift in self.head.shift(image):
            context.shift = shift.expand(count, -1, -1)
            found.append(self.texts.encode(self.model, classes).float())
        context.shift = None
        return torch.stack(found)

    @property
    def scale(self) -> Tensor:
        return self.towers.logit_scale.exp().float()

    def forward(self, images: Tensor, classes: slice = slice(None)) -> Tensor:
        """Scores [B, C] of images, or of unit features [B, d]."""
        self.prepare()
        image = self.image_features(images)
        scores: Tensor = self.head(image, self.text_features(image, classes), self.scale)
        return scores

    # -- training --------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        own = self.consistency.callbacks() if self.consistency else ()
        return [*super().configure_callbacks(), class_file(self.predictions, lambda: self.classes), *own]

    def check(self, batch: tuple[Tensor, Tensor]) -> None:
        check_labels(batch[1], len(self.classes))

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        image = self.image_features(images)
        text = self.text_features(image, slice(0, self.base))
        scores = self.head(image, text, self.scale)
        loss = F.cross_entropy(scores, labels)
        if self.consistency is not None:
            loss = loss + self.consistency(self, images, image, text, scores)
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def on_fit_end(self) -> None:
        """Let the head choose by the validation images what no gradient chooses."""
        loader = self.datamodule.val_dataloader()
        batches = [(self.image_features(i.to(self.device)), lab.to(self.device)) for i, lab in loader] if loader else []
        if batches:
            image, labels = (torch.cat(side) for side in zip(*batches))
            with torch.no_grad():
                self.head.tune(image, self.frozen_text, labels, self.scale)
            self.resave_after_fit = self.head.keeps_features

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        """Count what is right in a batch."""
        images, labels = batch
        scores = self(images)
        base = labels < self.base
        known = scores[base, : self.base].argmax(1) == labels[base]
        self.metrics[f"{stage}_base"].update(known.float())
        if self.head.names_new_classes and self.base < len(self.classes):
            new = scores[~base, self.base :].argmax(1) + self.base == labels[~base]
            self.metrics[f"{stage}_new"].update(new.float())

    def results(self, stage: str) -> Mapping[str, Tensor]:
        """Accuracies since the last call and their harmonic mean `2 b n / (b + n)`.

        Not a number where a head cannot name new classes; base classes alone where there are no others.
        """
        base, new = (self.metrics[f"{stage}_{key}"] for key in ("base", "new"))
        found: dict[str, Tensor] = {"base": base.compute()}
        if self.base < len(self.classes):
            found["new"] = new.compute() if self.head.names_new_classes else torch.tensor(torch.nan)
            found["harmonic"] = 2 / torch.stack(list(found.values())).clamp(min=1e-8).reciprocal().sum()
        base.reset()
        new.reset()
        return found

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], index: int) -> Fields:
        """Identifiers and class probabilities of one batch; `PredictionFile` puts them into a file."""
        images, identifiers = batch
        return {"id": list(identifiers), "probabilities": self(images).softmax(-1).cpu()}

    def meaning(self) -> Facts:
        return {"classes": self.classes}

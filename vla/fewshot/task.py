"""Few-shot recognition with an image-text pair: learn base classes from a handful of images, name new ones as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mmpeft.errors import ConfigError
from mmpeft.hosting.recompute import Recompute
from mmpeft.methods.base import Method
from mmpeft.methods.compose import Frozen
from mmpeft.parts.in_place import InPlace
from mmpeft.surgery.choice import use
from mmpeft.tasks.module import TuningModule
from mmpeft.tuning import Tuning
from mmpeft.vla.backbone import create, preprocessing, tokenizer
from mmpeft.vla.fewshot.consistency import Consistency
from mmpeft.vla.fewshot.features import CachedViews, tuned_towers
from mmpeft.vla.fewshot.heads import Head
from mmpeft.vla.fewshot.texts import ClassTexts


class FewShot(TuningModule):
    """Adapts an image-text pair to the base classes of the data module; scores are `s f tᵀ` unless the head says else.

    What is known as CoOp, MaPLe or CLIP-LoRA is a method on the towers; CLIP-Adapter, Tip-Adapter, TaskRes or a linear
    probe is a head behind them; any method goes with any head. Where the image tower is left alone its features are
    computed once. Reported are accuracies of base images among base classes, of new images among new ones, and their
    harmonic mean.
    """

    def __init__(
        self,
        backbone: str,
        method: Method | None = None,
        head: Head | None = None,
        pretrained: bool = True,
        templates: Sequence[str] = ("a photo of a {}.",),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        lr_scheduler: LRSchedulerCallable | None = None,
        consistency: Consistency | None = None,
        views: int = 10,
        recompute: Recompute = None,
        compile: bool = False,
        image_size: int | None = None,
    ) -> None:
        """
        Args:
            backbone: `<architecture>/<tag>`, `hf-hub:…`, `local-dir:<folder>` or `embedded:clip_emoji`.
            method: what is trained of the towers and how; none for heads that leave them alone.
            head: what is behind the towers; the plain zero-shot scores if left out.
            pretrained: whether to load the pair's weights.
            templates: texts around a class name; their features are averaged. Learned context replaces them.
            optimizer: any torch optimiser, given everything that trains.
            warmup: share of all steps with a linear rise of the learning rate; cosine decay to zero follows.
            lr_scheduler: a scheduler in place of warm-up and cosine, stepped after each optimiser step.
            consistency: terms that hold the tuned features near the frozen ones (PromptSRC).
            views: augmented views of each training image that are kept where the image tower is frozen.
            recompute: what blocks compute again in the backward pass: nothing, `pointwise` operations, or `block`.
            compile: compile every block with torch.compile.
            image_size: height and width in pixels; None for the pair's own.
        """
        method = method or Frozen()
        super().__init__(method, optimizer, warmup, recompute, compile, train_head=False, lr_scheduler=lr_scheduler)
        if views < 1:
            raise ConfigError(f"views is a number of augmented views >= 1, got {views}")
        self.backbone, self.pretrained, self.image_size = backbone, pretrained, image_size
        self.templates, self.views, self.consistency = list(templates), views, consistency
        self.head = head or Head()
        self.classes: list[str] = []
        self.base = 0
        self.kept: CachedViews | None = None
        self.metrics = nn.ModuleDict({f"{s}_{k}": MeanMetric() for s in ("val", "test") for k in ("base", "new")})

    # -- towers, texts and head ------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            self.classes = list(getattr(data, "classes", ()))
            self.base = int(getattr(data, "base", len(self.classes)))
        if not self.classes:
            raise ConfigError(f"{type(data).__name__} names no classes; FewShot needs their names")
        model = create(self.backbone, self.pretrained, self.image_size)
        if data is not None:
            data.configure(*preprocessing(model))
        return model

    def prepare(self) -> Tuning:
        first = self.tuning is None
        tuning = super().prepare()
        if first:
            model: Any = self.model
            self.tuned = tuned_towers(tuning)
            contexts = [p.part for p in tuning.placements if isinstance(p.part, InPlace)]
            if self.head.by_image and not contexts:
                raise ConfigError(f"{type(self.head).__name__} moves a learned context: give it the method CoOp")
            if self.head.keeps_features and self.tuned & {"image", ""}:
                raise ConfigError(
                    f"{type(self.head).__name__} keeps features of the training images, which {self.method} would "
                    "change: tune the text tower alone (at='text:…'), or take another head"
                )
            tokens = tokenizer(self.backbone)
            self.texts = ClassTexts(self.classes, self.templates, tokens, tuning)
            with torch.no_grad(), use(model, None):
                plain = ClassTexts(self.classes, self.templates, tokens, tuning) if not contexts else None
                frozen = (plain or ClassTexts(self.classes, self.templates, tokens, _Nothing())).encode(model)
            self.register_buffer("frozen_text", frozen, persistent=False)
            self.head.start(frozen, self.base, contexts[0].tokens.shape[1] if contexts else 0)
            self.contexts = contexts
            self._keep_features()
        return tuning

    def _keep_features(self) -> None:
        """Compute the training features of a frozen image tower once, and let the head see them, before the optimiser
        asks what trains: the keys of a Tip-Adapter do."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is None or data.train_set is None or self.tuned & {"image", ""}:
            return
        device = self._trainer.strategy.root_device  # type: ignore[union-attr]
        self.to(device)
        views, labels = CachedViews.compute(self.image_features, data, self.views, device)
        self.head.remember(F.normalize(views.mean(0), dim=-1), labels.to(device))
        self.kept = CachedViews(views.cpu(), labels, data.train_set)

    def configure_model(self) -> None:
        """Lightning's hook, called before any batch: train on the features that are kept of this run's images."""
        super().configure_model()
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is not None and self.kept is not None and self.kept.images is data.train_set:
            data.lend(self.kept)

    def teardown(self, stage: str) -> None:
        """Lightning's hook: others may train on the images themselves."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is not None and self.kept is not None:
            data.lend(None)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features [B, d]; features that were kept are passed on."""
        if images.dim() == 2:
            return images
        model: Any = self.model
        with torch.set_grad_enabled(torch.is_grad_enabled() and "image" in self.tuned):
            features: Tensor = model.encode_image(images, normalize=True)
        return features.float()

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
        model: Any = self.model
        return model.logit_scale.exp().float()

    def forward(self, images: Tensor, classes: slice = slice(None)) -> Tensor:
        """Scores [B, C] of images, or of unit features [B, d]."""
        self.prepare()
        image = self.image_features(images)
        scores: Tensor = self.head(image, self.text_features(image, classes), self.scale)
        return scores

    # -- training --------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Lightning's hook: what a task brings along."""
        return [*super().configure_callbacks(), *(self.consistency.callbacks() if self.consistency else ())]

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
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        loader = data.val_dataloader()
        batches = [(self.image_features(i.to(self.device)), lab.to(self.device)) for i, lab in loader] if loader else []
        if batches:
            image, labels = (torch.cat(side) for side in zip(*batches))
            with torch.no_grad():
                self.head.tune(image, self.frozen_text, labels, self.scale)
            self.decided = self.head.keeps_features

    # -- evaluation ------------------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        """Count what is right in a batch."""
        images, labels = batch
        scores = self(images)
        base = labels < self.base
        known = scores[base, : self.base].argmax(1) == labels[base]
        self.metrics[f"{stage}_base"].update(known.float())
        if self.head.names_new_classes:
            new = scores[~base, self.base :].argmax(1) + self.base == labels[~base]
            self.metrics[f"{stage}_new"].update(new.float())

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        self.log_dict({f"{stage}/{key}": value for key, value in self.collect(stage).items()}, prog_bar=True)

    def collect(self, stage: str) -> dict[str, Tensor]:
        """Accuracies since the last call and their harmonic mean `2 b n / (b + n)`.

        Not a number where a head cannot name new classes; base classes alone where there are no others.
        """
        base, new = (self.metrics[f"{stage}_{key}"] for key in ("base", "new"))
        found = {"base": base.compute()}
        if self.base < len(self.classes):
            found["new"] = new.compute() if self.head.names_new_classes else torch.tensor(torch.nan)
            found["harmonic"] = 2 / torch.stack(list(found.values())).clamp(min=1e-8).reciprocal().sum()
        base.reset()
        new.reset()
        return found

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], index: int) -> dict[str, Any]:
        """Identifiers and class probabilities of one batch."""
        images, identifiers = batch
        return {"id": list(identifiers), "probabilities": self(images).softmax(-1).cpu()}


class _Nothing:
    """A tuning that places nothing: class texts with their templates."""

    placements = ()

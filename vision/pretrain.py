"""Pretraining of the embedded ViT: what an emoji is, whoever drew it.

Every identity is seen in two drawing styles; the targets are its identity, subcategory, category and the words
of its name. Words and categories are what carries over to emoji never seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from mmpeft.data.loading import DataModule
from mmpeft.embedded import EmojiSet, emoji
from mmpeft.embedded.augment import StyleAugment
from mmpeft.methods import Full
from mmpeft.methods.base import Method
from mmpeft.tasks.pretraining import WritesWeights
from mmpeft.tasks.schedule import warmup_cosine
from mmpeft.types import AnyModule, Json, Kwargs

STYLES = ("noto", "twemoji")
STOP_WORDS = frozenset({"with", "of", "and", "the", "in", "on", "flag"})
MEAN, STD = 0.5, 0.5


def vocabulary(sets: EmojiSet, least: int = 3) -> list[str]:
    """Words of names and keywords that at least `least` identities share."""
    count = Counter(word for words in _words(sets) for word in words)
    return sorted(word for word, n in count.items() if n >= least and word not in STOP_WORDS)


def _words(sets: EmojiSet) -> list[set[str]]:
    texts = (" ".join([name, *keywords]).lower() for name, keywords in zip(sets.names, sets.keywords))
    return [set(re.findall(r"[a-z]{2,}", text)) for text in texts]


def word_targets(sets: EmojiSet, words: Sequence[str]) -> Tensor:
    """Uniform distributions over each emoji's own words, [n, words]; zero rows where it has none."""
    has = torch.tensor([[float(word in own) for word in words] for own in _words(sets)])
    return has / has.sum(1, keepdim=True).clamp(min=1)


def default_optimizer(groups: Iterable[Kwargs]) -> torch.optim.Optimizer:
    """timm's Muon at 0.02 with Nesterov momentum .95, AdamW at 1e-3 for what is no matrix of a block."""
    from timm.optim import Muon

    optimizer: torch.optim.Optimizer = Muon(
        groups,
        lr=0.02,
        weight_decay=0.01,
        nesterov=True,
        adjust_lr_fn="original",
        fallback_lr_scale=0.05,
        betas=(0.9, 0.98),
    )
    return optimizer


class EmojiPairs(DataModule):
    """Emoji in every pretraining style, to pretrain the embedded ViT.

    Batches of identities, each drawn in every pretraining style: `(rgba uint8 [B, styles, 4, 64, 64], index)`.

    Validation gives `(rgba, category)` of identities outside pretraining, in the seen styles and in OpenMoji.
    """

    def __init__(self, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size=256)
        self.identities = emoji(STYLES[0], "train")

    def datasets(self, stage: str | None = None) -> None:
        drawings = torch.stack([emoji(style, "train").images for style in STYLES], 1)
        self.train_set = TensorDataset(drawings, torch.arange(len(drawings)))
        held_out = [emoji(style, "val") for style in (*STYLES, "openmoji")]
        style = torch.arange(len(held_out)).repeat_interleave(len(held_out[0]))
        self.val_set = TensorDataset(
            torch.cat([s.images for s in held_out]), torch.cat([s.labels for s in held_out]), style
        )


class EmojiPretraining(WritesWeights):
    """Trains a timm VisionTransformer from scratch by the method `Full`, and writes it as an embedded backbone."""

    seen = "Noto Emoji and Twemoji, split train; OpenMoji and the identities of val and test never seen"
    words: Tensor
    labels: Tensor

    def __init__(
        self,
        architecture: Json,
        method: Method | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        warmup: float = 0.05,
        identity_weight: float = 0.3,
        label_smoothing: float = 0.1,
        seed: int = 0,
        name: str = "vit_emoji",
        folder: str | None = None,
    ) -> None:
        """
        Args:
            architecture: keyword arguments of timm's VisionTransformer.
            folder: where `<name>.safetensors` and `<name>.json` are written when training ends; None for `weights` in
                the run's folder.
        """
        super().__init__(method or Full(), optimizer, warmup, train_head=False)
        self.architecture, self.name, self.folder = dict(architecture), name, folder
        self.identity_weight, self.label_smoothing = identity_weight, label_smoothing
        self.augment = StyleAugment()
        self.generator = torch.Generator().manual_seed(seed)
        known = emoji(STYLES[0], "train")
        words = vocabulary(known)
        self.register_buffer("words", word_targets(known, words), persistent=False)
        self.register_buffer("labels", torch.stack([known.sublabels, known.labels], 1), persistent=False)
        width = int(self.architecture["embed_dim"])
        sizes = {"identity": len(known), "sub": len(known.subcategories), "cat": len(known.classes), "word": len(words)}
        self.heads = nn.ModuleDict({key: nn.Linear(width, size) for key, size in sizes.items()})

    def build(self) -> nn.Module:
        """The ViT, its position embedding starting at half a 2-D sine grid: neighbours are known from step one."""
        from timm.layers import build_sincos2d_pos_embed
        from timm.models import VisionTransformer

        vit: AnyModule = VisionTransformer(num_classes=0, **self.architecture)
        if not torch.cuda.is_available():
            for block in vit.blocks:  # of this model alone: timm's own switch is of the whole process
                block.attn.fused_attn = False  # on a CPU in bf16 the written-out attention trains 1.7 times as fast
        grid = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), dim=vit.embed_dim)
        vit.pos_embed.data.copy_(0.5 * grid.view_as(vit.pos_embed))
        return vit  # type: ignore[no-any-return]  # timm is not followed

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Muon for the matrices of the blocks; its AdamW fallback for embeddings, heads, norms and biases."""
        groups: dict[str, list[nn.Parameter]] = {"muon": [], "matrices": [], "vectors": []}
        for name, parameter in self.trainable():
            inside = ".blocks." in name and parameter.dim() == 2
            groups["muon" if inside else "matrices" if parameter.dim() > 1 else "vectors"].append(parameter)
        optimizer = self.optimizer(
            [
                {"params": groups["muon"]},
                {"params": groups["matrices"], "use_fallback": True, "weight_decay": 0.05},
                {"params": groups["vectors"], "use_fallback": True, "weight_decay": 0.0},
            ]
        )
        schedule = warmup_cosine(optimizer, int(self.trainer.estimated_stepping_batches), self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, d] of images in [0, 1]."""
        assert self.model is not None
        features: Tensor = self.model((images - MEAN) / STD)
        return features.float()

    def loss(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        drawings, identity = batch
        styles = drawings.shape[1]
        images = self.augment(drawings.flatten(0, 1).float() / 255, self.generator)
        features = self(images)
        identity = identity.repeat_interleave(styles)
        smooth = self.label_smoothing
        subcategory, category = self.labels[identity].unbind(1)
        losses = {
            "identity": F.cross_entropy(self.heads["identity"](features), identity, label_smoothing=smooth),
            "sub": F.cross_entropy(self.heads["sub"](features), subcategory, label_smoothing=smooth),
            "cat": F.cross_entropy(self.heads["cat"](features), category, label_smoothing=smooth),
            "word": F.cross_entropy(self.heads["word"](features), self.words[identity]),
        }
        loss = sum(losses.values()) - (1 - self.identity_weight) * losses["identity"]
        self.log_dict({f"train/{key}": value for key, value in losses.items()}, on_step=False, on_epoch=True)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], index: int) -> None:
        drawings, category, style = batch
        rgba = drawings.float() / 255
        images = rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
        right = self.heads["cat"](self(images)).argmax(1) == category
        for name, own in (("seen_styles", style < len(STYLES)), ("openmoji", style == len(STYLES))):
            if own.any():
                self.log(f"val/{name}", right[own].float().mean(), prog_bar=True, batch_size=int(own.sum()))

    def write(self, folder: Path, card: Json) -> None:
        """The backbone alone, with its architecture, data and final metrics as the card."""
        from mmpeft.vision.backbone import save_embedded

        facts = {
            "architecture": self.architecture,
            "num_classes": 0,
            "pretrained_cfg": {"mean": [MEAN] * 3, "std": [STD] * 3, "input_size": [3, 64, 64]},
        }
        with self.merged() as model:
            save_embedded(model, self.name, folder, {**facts, **card})

"""Pretraining of the embedded image-text pair: what an emoji is called, whoever drew it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from open_clip.loss import ClipLoss
from timm.layers import set_fused_attn
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmpeft.data.loading import DataModule
from mmpeft.embedded import emoji, spoken
from mmpeft.embedded.augment import StyleAugment
from mmpeft.embedded.captions import TEMPLATES, captions, dressed
from mmpeft.embedded.store import WEIGHTS, backbone_tensors, read_weights
from mmpeft.files import write_atomic
from mmpeft.methods import Full
from mmpeft.methods.base import Method
from mmpeft.tasks.pretraining import WritesWeights
from mmpeft.tasks.schedule import warmup_cosine
from mmpeft.types import AnyModule, Json
from mmpeft.vla.backbone import build, save, tokenizer
from mmpeft.vla.contrastive.task import MAX_SCALE, ContrastiveTuner, recall

STYLES = ("noto", "twemoji")
MEAN, STD = [0.5] * 3, [0.5] * 3
WORDS = (
    "a photo of a drawing of the an icon emoji what where how many which is are there in on to left right above below "
    "between next colour color red orange yellow green blue purple pink brown black white grey behind left of right of "
    "top bottom middle corner one two three four five six seven eight nine zero yes no picture scene kind name object"
)


def train_tokenizer(texts: Sequence[str], size: int, folder: Path, context: int) -> None:
    """Byte-level BPE in lower case, written as transformers' files; the end token has the highest number."""
    fast = Fast(models.BPE())
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    fast.add_special_tokens(["<start>", "<end>"])
    start, end = fast.token_to_id("<start>"), fast.token_to_id("<end>")
    fast.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<start>",
        "eos_token": "<end>",
        "model_max_length": context,
    }
    write_atomic(folder / "tokenizer.json", fast.to_str().encode())
    write_atomic(folder / "tokenizer_config.json", (json.dumps(facts, indent=2) + "\n").encode())


class CaptionedEmoji(Dataset[tuple[Tensor, str, Tensor]]):
    """One drawing of every identity, in a style and with a caption that change from epoch to epoch."""

    def __init__(self) -> None:
        sets = [emoji(style, "train") for style in STYLES]
        self.drawings = torch.stack([s.images for s in sets], 1)
        self.captions = captions(sets[0])
        self.labels = torch.stack([sets[0].sublabels, sets[0].labels], 1)

    def __len__(self) -> int:
        """Return the number of identities."""
        return len(self.drawings)

    def __getitem__(self, index: int) -> tuple[Tensor, str, Tensor]:
        """Return `(uint8 RGBA [4, 64, 64], caption, (kind, category))`."""
        style = int(torch.randint(len(STYLES), ()))
        said = self.captions[index]
        return self.drawings[index, style], dressed(said[int(torch.randint(len(said), ()))]), self.labels[index]


class CaptionedEmojiData(DataModule):
    """Emoji with captions, to pretrain the embedded pair.

    Batches are `(rgba uint8 [B, 4, 64, 64], captions, labels)`; validation `(rgba, kind, category, row, style)`.
    """

    def __init__(self, batch_size: int = 128, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size=256)

    def datasets(self, stage: str | None = None) -> None:
        self.train_set = CaptionedEmoji()
        held_out = [emoji(style, "val") for style in (*STYLES, "openmoji")]
        style = torch.arange(len(held_out)).repeat_interleave(len(held_out[0]))
        columns = [torch.cat([getattr(s, name) for s in held_out]) for name in ("images", "sublabels", "labels")]
        row = torch.arange(len(held_out[0])).repeat(len(held_out))
        self.val_set = torch.utils.data.TensorDataset(*columns, row, style)


class PairPretraining(WritesWeights, ContrastiveTuner):
    """Trains an image-text pair by the method `Full`, and writes it as an embedded one.

    The image tower starts from an embedded ViT that saw the same drawings, the text tower from nothing.
    """

    seen = "Noto Emoji and Twemoji, split train, with names and kinds; OpenMoji and other identities never seen"
    headline = ("openmoji_image_to_text@5", "openmoji_kind", "openmoji_category")

    def __init__(
        self,
        model_cfg: Json,
        method: Method | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        image_tower: str = "vit_emoji",
        image_lr: float = 0.02,
        kind_weight: float = 0.5,
        smoothing: float = 0.1,
        seed: int = 0,
        name: str = "clip_emoji",
        folder: str | None = None,
    ) -> None:
        """
        Args:
            model_cfg: open_clip's configuration of the pair.
            image_tower: the embedded ViT the image tower starts from.
            image_lr: learning rate of the image tower as a share of the text tower's.
            kind_weight: of the cross entropies over kinds and categories, beside the contrast with captions.
            smoothing: label smoothing of those.
            folder: where the folder `<name>` is written when training ends; None for `weights` in the run's folder.
        """
        super().__init__(name, method or Full(), tune_scale=True, pretrained=False, optimizer=optimizer, warmup=warmup)
        self.model_cfg, self.name, self.folder = dict(model_cfg), name, folder
        self.image_tower, self.image_lr = image_tower, image_lr
        self.kind_weight, self.smoothing = kind_weight, smoothing
        known = emoji(STYLES[0], "train")
        self.names = [[spoken(name) for name in names] for names in (known.subcategories, known.classes)]
        self.augment = StyleAugment()
        self.generator = torch.Generator().manual_seed(seed)

    def build(self) -> nn.Module:
        known = emoji(STYLES[0], "train")
        texts = [caption for own in captions(known) for caption in own] + [WORDS, *TEMPLATES] * 20
        text = self.model_cfg["text_cfg"]
        folder = self.target() / self.name
        train_tokenizer(texts, text["vocab_size"], folder, text["context_length"])
        write_atomic(folder / "open_clip_config.json", (json.dumps(self._config(), indent=2) + "\n").encode())
        self.tokenizer = tokenizer(str(folder))
        self.unfuse()
        model = build(self.model_cfg)
        tower: AnyModule = model.visual
        tower.trunk.load_state_dict(read_weights(WEIGHTS / f"{self.image_tower}.safetensors"))
        return model

    @staticmethod
    def unfuse() -> None:
        """On a CPU in bf16 the written-out attention trains 1.7 times as fast."""
        if not torch.cuda.is_available():
            set_fused_attn(False)

    def _config(self) -> Json:
        return {"model_cfg": self.model_cfg, "preprocess_cfg": {"mean": MEAN, "std": STD}}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The image tower apart, at a lower rate; no decay for vectors, embeddings and the scale."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.trainable():
            plain = parameter.dim() > 1 and "embed" not in name
            groups.setdefault((".trunk." in name, plain), []).append(parameter)
        optimizer = self.optimizer(
            [
                {"params": own, "share": self.image_lr if image else 1.0, **({} if plain else {"weight_decay": 0.0})}
                for (image, plain), own in groups.items()
            ]
        )
        for group in optimizer.param_groups:
            group["lr"] *= group["share"]
        schedule = warmup_cosine(optimizer, int(self.trainer.estimated_stepping_batches), self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loss(self, batch: tuple[Tensor, Sequence[str], Tensor], index: int) -> Tensor:
        """The contrast with captions, and the cross entropy over the texts of all kinds and of all categories.

        Many emoji are of one kind: in a contrast they would be each other's negatives.
        """
        drawings, texts, labels = batch
        images = (self.augment(drawings.float() / 255, self.generator) - 0.5) / 0.5
        model: AnyModule = self.model
        losses = self.naming(model.encode_image(images, normalize=True).float(), texts, labels)
        return self.total(losses, len(images))

    def naming(self, image: Tensor, texts: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        """The three losses of unit features [B, e] whose captions and labels [B, 2] are known."""
        model: AnyModule = self.model
        sets = [self.tokens(own) for own in (texts, *([*map(dressed, own)] for own in self.names))]
        text = model.encode_text(torch.cat(sets), normalize=True).float()
        scale = model.logit_scale.clamp(max=math.log(MAX_SCALE)).exp()
        caption, kinds, groups = text.split([len(own) for own in sets])
        return {
            "caption": ClipLoss()(image, caption, scale),
            "kind": F.cross_entropy(scale * image @ kinds.t(), labels[:, 0], label_smoothing=self.smoothing),
            "category": F.cross_entropy(scale * image @ groups.t(), labels[:, 1], label_smoothing=self.smoothing),
        }

    def total(self, losses: dict[str, Tensor], count: int) -> Tensor:
        """The weighted sum, with its terms in the log."""
        loss = losses["caption"] + self.kind_weight * (losses["kind"] + losses["category"])
        self.log_dict({f"train/{key}": value for key, value in losses.items()}, on_step=False, on_epoch=True)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=count)
        return loss

    def evaluate(self, batch: tuple[Tensor, ...], stage: str) -> None:
        drawings, *rest = batch
        rgba = drawings.float() / 255
        images = (rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:] - 0.5) / 0.5
        model: AnyModule = self.model
        self._kept.append((model.encode_image(images, normalize=True).float(), torch.stack(rest, 1), rest[0]))

    def results(self, stage: str) -> Mapping[str, Tensor]:
        """Retrieval among unseen identities and zero-shot naming of their kinds, in each style."""
        model: AnyModule = self.model
        image, facts = (torch.cat([kept[i] for kept in self._kept]) for i in (0, 1))
        self._kept = []
        known = emoji("openmoji", "val")
        names, kinds, groups = (
            model.encode_text(self.tokens(texts), normalize=True).float()
            for texts in ([spoken(name) for name in known.names], *self.names)
        )
        values: dict[str, Tensor] = {}
        for k, style in enumerate((*STYLES, "openmoji")):
            own = facts[:, 3] == k
            if not own.any():
                continue
            found = {"image_to_text@5": recall(image[own], names[facts[own, 2]], facts[own, 2])["image_to_text@5"]}
            found["kind"] = ((image[own] @ kinds.t()).argmax(1) == facts[own, 0]).float().mean()
            found["category"] = ((image[own] @ groups.t()).argmax(1) == facts[own, 1]).float().mean()
            values |= {f"{style}_{key}": value for key, value in found.items()}
        return values

    def write(self, folder: Path, card: Json) -> None:
        """The pair in open_clip's layout, with data and final metrics as the card."""
        with self.merged() as pair:
            save(pair, folder / self.name, self._config(), backbone_tensors(pair), **card)

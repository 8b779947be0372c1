"""Pretraining of the embedded text-to-image pipelines: drawings of emoji from their names, in two styles."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf
from torchvision.utils import make_grid

from mmpeft.data.loading import DataModule
from mmpeft.diffusion.objective import FlowMatching, TimestepSampling
from mmpeft.diffusion.pipeline import PixelPipeline
from mmpeft.diffusion.text import text_encoder
from mmpeft.embedded import emoji
from mmpeft.embedded.captions import captions, dressed
from mmpeft.embedded.store import WEIGHTS
from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.formats.merged import merged_copy
from mmpeft.methods import Full
from mmpeft.methods.base import Method
from mmpeft.tasks.pretraining import WritesWeights
from mmpeft.tasks.publish import run_folder
from mmpeft.types import Json

STYLES = ("noto", "twemoji")
PROMPTS = (
    "a drawing of a cat",
    "flag: japan",
    "red apple",
    "a drawing of a car",
    "smiling face",
    "a house",
    "shoe",
    "fish",
)
CARD = "card.json"


class DrawnCaptions(Dataset[tuple[Tensor, str]]):
    """Every drawing of the pretraining identities with a caption that changes from epoch to epoch."""

    def __init__(self, split: str, size: int, move: bool) -> None:
        sets = [emoji(style, split, size) for style in STYLES]
        self.images = torch.cat([s.rgb() for s in sets])
        self.captions = [own for s in sets for own in captions(s)]
        self.move = v2.RandomAffine(0, (0.06, 0.06), (0.9, 1.06), interpolation=v2.InterpolationMode.BILINEAR, fill=255)
        self.moving = move

    def __len__(self) -> int:
        """Return the number of drawings."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return `(image in [−1, 1] float [3, S, S], caption)`."""
        image = self.images[index].clone()
        image = self.move(image) if self.moving else image
        said = self.captions[index]
        return image.float() / 127.5 - 1, dressed(said[int(torch.randint(len(said), ()))])


class DrawnCaptionsData(DataModule):
    """Noto and Twemoji with their captions, `(images [B, 3, S, S] in [−1, 1], captions)`."""

    def __init__(self, size: int = 32, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size=128)
        self.size = size

    def datasets(self, stage: str | None = None) -> None:
        self.train_set = DrawnCaptions("train", self.size, move=True)
        self.val_set = DrawnCaptions("val", self.size, move=False)


class PipelinePretraining(WritesWeights):
    """Trains a UNet or a DiT from scratch by the method `Full` with flow matching, and writes an embedded pipeline."""

    seen = "Noto Emoji and Twemoji, split train, with names and kinds; OpenMoji and other identities never seen"

    def __init__(
        self,
        denoiser: str,
        config: Json,
        method: Method | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        no_caption: float = 0.1,
        shift: float = 1.0,
        seed: int = 0,
        name: str = "unet_emoji",
        folder: str | None = None,
    ) -> None:
        """
        Args:
            denoiser: diffusers' class, `UNet2DConditionModel` or `PixArtTransformer2DModel`.
            config: its keyword arguments.
            no_caption: share of captions left empty, for guidance.
            shift: of the noise levels towards noise.
            folder: where the pipeline's folder `<name>` is written when training ends; None for `weights` in the
                run's folder.
        """
        super().__init__(method or Full(), optimizer, warmup, train_head=False)
        if denoiser not in ("UNet2DConditionModel", "PixArtTransformer2DModel"):
            raise ConfigError(f"denoiser is UNet2DConditionModel or PixArtTransformer2DModel, got {denoiser!r}")
        self.denoiser, self.config, self.no_caption = denoiser, dict(config), no_caption
        self.objective = FlowMatching(TimestepSampling("logit_normal", shift=shift))
        self.generator = torch.Generator().manual_seed(seed)
        self.name, self.folder = name, folder
        self.pipeline: PixelPipeline | None = None

    def build(self) -> nn.Module:
        model: nn.Module = getattr(diffusers, self.denoiser)(**self.config)
        encoder, tokenizer = text_encoder(WEIGHTS / "clip_emoji")
        part = "unet" if self.denoiser.startswith("UNet") else "transformer"
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.objective.timesteps.shift)
        pipeline = self.__dict__["pipeline"] = PixelPipeline(scheduler, encoder, tokenizer, **{part: model})
        pipeline.set_progress_bar_config(disable=True)
        return model

    def _error(self, images: Tensor, texts: Sequence[str], steps: Tensor, noise: Tensor) -> Tensor:
        assert self.pipeline is not None
        with torch.no_grad():
            text, mask = self.pipeline.encode_prompt(texts)
        noisy = self.objective.noisy(images, noise, steps)
        return self.objective.loss(self.pipeline.predict(noisy, steps, text, mask), images, noise, steps)

    def loss(self, batch: tuple[Tensor, Sequence[str]], index: int) -> Tensor:
        images, texts = batch
        said = torch.rand(len(texts), generator=self.generator) >= self.no_caption
        texts = [text if keep else "" for text, keep in zip(texts, said.tolist())]
        steps = self.objective.draw(len(images), self.generator).to(images.device)
        noise = torch.randn(images.shape, generator=self.generator).to(images)
        loss = self._error(images, texts, steps, noise)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Sequence[str]], index: int) -> None:
        """The error on unseen identities at fixed noise levels."""
        images, texts = batch
        steps = torch.linspace(50, 950, len(images), device=images.device)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(index)).to(images)
        self.log("val/loss", self._error(images, texts, steps, noise), prog_bar=True, batch_size=len(images))

    def on_validation_epoch_end(self) -> None:
        """A grid of samples from fixed noise."""
        if self.trainer.sanity_checking or getattr(self.trainer, "fast_dev_run", False):
            return
        grid = self.sample(PROMPTS, 4)
        folder = run_folder(self.trainer)
        picture = io.BytesIO()
        tf.to_pil_image(grid).resize((grid.shape[2] * 3, grid.shape[1] * 3), 0).save(picture, "PNG")
        write_atomic(folder / "samples" / f"{self.global_step:06d}.png", picture.getvalue())

    def sample(self, prompts: Sequence[str], rows: int) -> Tensor:
        """Samples of prompts, one column each, float [3, H, W] in [0, 1]."""
        assert self.pipeline is not None
        size, noise = self.pipeline.size, torch.Generator().manual_seed(0)
        latents = torch.randn(rows, 3, size, size, generator=noise).repeat_interleave(len(prompts), 0)
        images = self.pipeline(list(prompts) * rows, latents=latents.to(self.device), output_type="pt").images
        grid: Tensor = make_grid(images.cpu(), nrow=len(prompts), padding=1, pad_value=1.0)
        return grid

    def write(self, folder: Path, card: Json) -> None:
        """The pipeline in fp16 with its card."""
        assert self.pipeline is not None
        assert self.tuning is not None
        plain = merged_copy(self.tuning).half()
        part = "unet" if self.pipeline.unet is not None else "transformer"
        pipeline = self.pipeline
        whole = PixelPipeline(pipeline.scheduler, pipeline.text_encoder, pipeline.tokenizer, **{part: plain})
        whole.to(torch.float16).save_pretrained(folder / self.name)
        pipeline.text_encoder.float()
        write_atomic(folder / self.name / CARD, (json.dumps(card, indent=2) + "\n").encode())

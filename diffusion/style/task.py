"""Tuning a text-to-image pipeline to a style or a subject, by any method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, Unpack

import torch
from lightning.pytorch.callbacks import Callback
from rich.progress import track
from torch import Generator, Tensor, nn

from mmpeft.combine.strength import strength
from mmpeft.data.sampling import hash_seed
from mmpeft.diffusion.backbone import DTYPES, create
from mmpeft.diffusion.data.base import HasPrompts
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.family import FACTS, Condition, Family
from mmpeft.diffusion.objective import Objective, TimestepSampling, objective_of
from mmpeft.diffusion.style.cache import Cache, latent_facts, text_facts
from mmpeft.diffusion.style.evaluation import StyleScores, StyleTest, predicted
from mmpeft.diffusion.style.grid import Show, StrengthGrid
from mmpeft.errors import ConfigError, renamed
from mmpeft.methods.base import Method
from mmpeft.surgery.choice import use
from mmpeft.tasks.module import TuningModule
from mmpeft.tasks.options import SteppingOptions
from mmpeft.tasks.publish import folder_of
from mmpeft.tuning import Tuning, attach
from mmpeft.types import Fields, Json


class StyleTuner(TuningModule):
    """Tunes a text-to-image pipeline to the style or the subject of images with captions.

    `mean_b w_b ‖f(x_t, t, c) − target‖²`, f the pipeline's denoiser under a method, on images with captions.

    The objective is the pipeline's own (ε, v, x₀ or flow matching). Latents and text features are computed once where
    the encoders stay frozen. Noise and timesteps depend on `(seed, epoch, batch, rank)` alone: a resumed run goes on
    bit for bit. What trains is fp32 on a base of any type.
    """

    monitor = ("val/loss", "min")

    def __init__(
        self,
        pipeline: str,
        method: Method | None = None,
        text_method: Method | None = None,
        warmup: float = 0.05,
        snr_gamma: float | None = None,
        timestep_sampling: TimestepSampling | None = None,
        no_caption: float = 0.0,
        prior_weight: float = 0.0,
        prior_prompt: str | None = None,
        resolution: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Json | None = None,
        cache_dir: str | None = None,
        show: Show | None = None,
        seed: int = 0,
        levels: TimestepSampling | None = None,
        **options: Unpack[SteppingOptions],
    ) -> None:
        """
        Args:
            pipeline: a hub repository, a folder of diffusers' layout, `embedded:unet_emoji` or `embedded:dit_emoji`.
            method: what is trained in the denoiser; the command line fills it from the key `method`.
            text_method: what is trained in every text encoder; None leaves them frozen.
            warmup: share of all steps with a linear rise of the learning rate; cosine decay to zero follows.
            snr_gamma: γ of min-SNR weights for ε, v and x₀ models, usually 5; None for equal weights.
            timestep_sampling: which timesteps are drawn; None for those the pipeline was made with.
            no_caption: share of captions left empty.
            prior_weight: of what keeps the model's prior: the data's prior images where they have some, else the
                prediction of the model with the tuning off, for `prior_prompt`, which needs no images.
            prior_prompt: what the model should go on drawing as before, for the second.
            resolution: side of the images in pixels (of their area, in buckets); None for the pipeline's own.
            dtype: of the frozen base.
            quantization: arguments of diffusers' PipelineQuantizationConfig, to quantise the base.
            cache_dir: where latents and text features are kept for other runs; None keeps them in memory.
            show: prompts and strengths of the validation grid.
            seed: of noise, timesteps and dropped captions.
            levels: deprecated name of `timestep_sampling`.
            options: those of `TuningModule`.
        """
        super().__init__(method, warmup=warmup, train_head=False, **options)
        if not 0 <= no_caption < 1:
            raise ConfigError(f"no_caption is a share of captions in [0, 1), got {no_caption}")
        if prior_weight < 0:
            raise ConfigError(f"prior_weight is not negative, got {prior_weight}")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
        if levels is not None:
            renamed(f"{type(self).__name__}(levels=…)", "timestep_sampling")
        self.timestep_sampling = timestep_sampling or levels
        self.source, self.text_method, self.snr_gamma = pipeline, text_method, snr_gamma
        self.no_caption, self.prior_weight, self.prior_prompt = no_caption, prior_weight, prior_prompt
        self.resolution, self.dtype_name, self.quantization = resolution, dtype, quantization
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.show, self.seed = show or Show(), seed
        self.texts = nn.ModuleDict()  # text encoders that are tuned
        self.text_tunings: dict[str, Tuning] = {}

    # -- what is tuned --------------------------------------------------------------------------------------

    def open(self) -> Family:
        """The pipeline to tune."""
        return family_of(create(self.source, DTYPES[self.dtype_name], self.quantization))

    def build(self) -> nn.Module:
        family = self.open()
        # Not registered as sub-modules: only what is tuned belongs to the module, moves with it and is checkpointed.
        self.__dict__["family"] = family
        self.objective: Objective = objective_of(family.pipeline.scheduler, self.snr_gamma, self.timestep_sampling)
        self._check(family)
        denoiser: nn.Module = family.denoiser
        return denoiser

    def _check(self, family: Family) -> None:
        """Raise before any compute what would be wrong after some: sizes, long prompts, a prior of nothing."""
        data = self.data(HasPrompts)
        self.size = self.resolution or (data and data.resolution) or family.size
        family.sides(self.size)
        family.check_prompts(self.own_prompts())
        if data is not None:
            data.configure(self.size, family.multiple)
            if data.resolution != self.size:
                raise ConfigError(f"the model's resolution is {self.size} and the data's is {data.resolution}; set one")
            family.check_prompts(data.prompts(), getattr(data, "where", None))
        if self.prior_weight and self.prior_prompt is None and not (data and data.has_prior):
            raise ConfigError("prior_weight needs prior images in the data (prior_root), or a prior_prompt")

    def own_prompts(self) -> list[str]:
        """Prompts that are the task's and not the data's."""
        return [*self.show.prompts, *([self.prior_prompt] if self.prior_prompt else [])]

    def start(self) -> None:
        if self.text_method is not None:
            for name, encoder in self.family.encoders.items():
                self.text_tunings[name] = attach(encoder, self.text_method)
                self.texts[name] = encoder
        family = self.family
        self.text_cache = Cache(list(family.encoders.values()), self.cache_dir, *text_facts(family))
        vae = [family.vae] if family.vae is not None else []
        self.latent_cache = Cache(vae, self.cache_dir, *latent_facts(family))

    @property
    def family(self) -> Family:
        """The pipeline under training."""
        found: Family = self.__dict__["family"]
        return found

    def configure_callbacks(self) -> list[Callback]:
        own = (StrengthGrid(self.show), StyleScores(self.show), StyleTest(), predicted())
        return [*super().configure_callbacks(), *own]

    # -- features -------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Text features of all captions, once; then the frozen encoders leave the device."""
        self.family.pipeline.to(self.device)
        data = self.data(HasPrompts)
        if not self.text_tunings and data is not None:
            self._encode_all([*data.prompts(), "", *([self.prior_prompt] if self.prior_prompt else [])])
            if self.device.type != "cpu":
                for encoder in self.family.encoders.values():
                    encoder.to("cpu")

    def _encode_all(self, prompts: Sequence[str]) -> None:
        unique = list(dict.fromkeys(prompts))
        for start in track(range(0, len(unique), 64), "text features", transient=True, disable=len(unique) < 256):
            self._texts(unique[start : start + 64])

    @torch.no_grad()
    def _texts(self, prompts: Sequence[str]) -> Condition:
        def compute(rows: list[int]) -> list[Condition]:
            encoders = self.family.encoders.values()
            for encoder in encoders:
                encoder.to(self.device)
            found = self.family.encode_prompt([prompts[row] for row in rows])
            return [{name: tensor[i] for name, tensor in found.items()} for i in range(len(rows))]

        self.text_cache.fill(prompts, compute)
        return self.text_cache.stacked(prompts, self.device)

    def condition(self, prompts: Sequence[str], batch: Fields | None = None) -> Condition:
        """What the denoiser is told: text features, and the facts of the images."""
        text = self.family.encode_prompt(prompts) if self.text_tunings else self._texts(prompts)
        return {**text, **{name: batch[name] for name in FACTS if batch is not None and name in batch}}

    @torch.no_grad()
    def latents(self, batch: Fields) -> Tensor:
        """Latents of a batch, from the cache where the data give each sample a `key` that names its pixels."""
        images: Tensor = batch["image"]
        if self.family.vae is None:
            return images
        if "key" not in batch:
            return self.family.encode_image(images)

        def compute(rows: list[int]) -> list[dict[str, Tensor]]:
            return [{"latent": one} for one in self.family.encode_image(images[rows])]

        self.latent_cache.fill(batch["key"], compute)
        return self.latent_cache.stacked(batch["key"], self.device)["latent"]

    # -- the loss -------------------------------------------------------------------------------------------

    def loss(self, batch: Fields, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.current_epoch, index, self.global_rank))
        loss = self._error(batch, generator, self.no_caption)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(batch["image"]))
        if self.prior_weight:
            prior = self._error(batch["prior"], generator) if "prior" in batch else self._drift(batch, generator)
            self.log("train/prior", prior, on_step=True, on_epoch=True, batch_size=len(batch["image"]))
            loss = loss + self.prior_weight * prior
        return loss

    def validation_step(self, batch: Fields, index: int) -> None:
        """The error on images that are not trained on, at the same noise and timesteps each time."""
        loss = self._error(batch, torch.Generator().manual_seed(hash_seed(self.seed, index, self.global_rank)), 0.0)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["image"]))

    def _error(self, batch: Fields, generator: Generator, no_caption: float = 0.0) -> Tensor:
        latents = self.latents(batch)
        noise, steps = self._draw(latents, generator)
        dropped = torch.rand(len(latents), generator=generator) < no_caption
        prompts = ["" if drop else prompt for prompt, drop in zip(batch["prompt"], dropped.tolist())]
        prediction = self._predict(latents, noise, steps, self.condition(prompts, batch))
        return self.objective.loss(prediction, latents, noise, steps)

    def _drift(self, batch: Fields, generator: Generator) -> Tensor:
        """`‖f(x_t, t, prior) − f₀(x_t, t, prior)‖²`, f₀ the model with its tuning off."""
        latents = self.latents(batch)
        noise, steps = self._draw(latents, generator)
        prompts = [self.prior_prompt or ""] * len(latents)
        with torch.no_grad(), self._base():
            teacher = self._predict(latents, noise, steps, self.condition(prompts, batch))
        return (self._predict(latents, noise, steps, self.condition(prompts, batch)) - teacher).float().square().mean()

    def _draw(self, latents: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        steps = self.objective.draw(len(latents), generator).to(latents.device)
        return torch.randn(latents.shape, generator=generator).to(latents), steps

    def _predict(self, latents: Tensor, noise: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        noisy = self.objective.noisy(latents, noise, steps)
        return self.family.predict(noisy.to(DTYPES[self.dtype_name]), steps, condition)

    # -- drawing --------------------------------------------------------------------------------------------

    @contextmanager
    def _base(self) -> Iterator[None]:
        """With every tuning off."""
        with ExitStack() as stack:
            for tuning in self.all_tunings():
                stack.enter_context(use(tuning.model, None))
            yield

    def all_tunings(self) -> list[Tuning]:
        """That of the denoiser, then those of the text encoders."""
        return [self.prepare(), *self.text_tunings.values()]

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], share: float = 1.0, seeds: Sequence[int] | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], prompt i from the noise of seed i; `share` is the strength of the tuning.

        Raises:
            Refused: a strength other than 0 and 1 of a method that has none.
        """
        generators = [torch.Generator().manual_seed(hash_seed(self.show.seed, s)) for s in seeds or range(len(prompts))]
        training = self.training
        self.eval()
        self.family.pipeline.to(self.device)
        with ExitStack() as stack:
            if share == 0:
                stack.enter_context(self._base())
            elif share != 1:
                for tuning in self.all_tunings():
                    stack.enter_context(strength(tuning, share))
            images = self.family.draw(prompts, generators, self.show.steps, self.show.guidance, self.size)
        self.train(training)
        return images.float().cpu()

    def predict_step(self, batch: Fields, index: int) -> Fields:
        """A drawing for each prompt, which become files."""
        return {"name": batch["name"], "images": self.draw(batch["prompt"], seeds=batch["seed"].tolist())}

    def test_step(self, batch: Fields, index: int) -> dict[str, Tensor]:
        """Images in [0, 1] by kind, for the test's prompts: drawn by hand, by the base, by the tuned model."""
        return self.drawings(batch, [index * 10_000 + i for i in range(len(batch["prompt"]))])

    def drawings(self, batch: Fields, seeds: Sequence[int], base: bool = True) -> dict[str, Tensor]:
        """Images in [0, 1] for the prompts of a batch by kind, as `evaluation.Drawn` names them.

        `base` says whether to draw by the base as well, and give the images by hand.
        """
        shares = {"base": 0.0, "test": 1.0} if base else {"test": 1.0}
        found = {"real": (batch["image"] + 1) / 2} if base else {}
        found |= {kind: self.draw(batch["prompt"], share, seeds) for kind, share in shares.items()}
        if "plain" in batch:
            if base and "plain_image" in batch:
                found["plain_real"] = (batch["plain_image"] + 1) / 2
            for kind, share in shares.items():
                found["plain" if kind == "test" else "plain_base"] = self.draw(batch["plain"], share, seeds)
        return found

    def on_train_end(self) -> None:
        """The text encoders' adapters beside the denoiser's."""
        folder = folder_of(self.trainer)
        if folder:
            self.save_texts(folder / "adapter")

    def save_texts(self, folder: Path) -> None:
        """What was trained in the text encoders."""
        for name, tuning in self.text_tunings.items():
            tuning.save(folder / name, inference=True)

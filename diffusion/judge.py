"""Local evaluators of drawings: which style, which category, and how far from a set of real ones (KID)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from mmpeft.embedded import emoji
from mmpeft.embedded.emoji import STYLES
from mmpeft.embedded.store import WEIGHTS, read_card, read_weights

LOW_BLOCKS = (0, 2)
"""Blocks whose statistics over patches tell the style; the last one tells the subject."""


class Features(nn.Module):
    """The embedded ViT's features of drawings: of the subject [B, 256], and statistics that tell the style."""

    def __init__(self) -> None:
        super().__init__()
        self.size = int(read_card(WEIGHTS / "vit_emoji.json")["architecture"]["img_size"])
        architecture = read_card(WEIGHTS / "vit_emoji.json")["architecture"]
        self.vit = VisionTransformer(**{**architecture, "num_classes": 0})
        self.vit.load_state_dict(read_weights(WEIGHTS / "vit_emoji.safetensors"))
        self.num_features = int(architecture["embed_dim"])
        self.eval().requires_grad_(False)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Subject and style features of images [B, 3, H, W] in [0, 1]."""
        found: list[tuple[Tensor, Tensor]] = []
        for part in images.split(128):
            x = F.interpolate(part.float(), size=self.size, mode="bilinear", antialias=True, align_corners=False)
            last, low = self.vit.forward_intermediates(x * 2 - 1, indices=list(LOW_BLOCKS), output_fmt="NLC")
            statistics = [torch.cat([maps.mean(1), maps.std(1)], 1) for maps in low]
            found.append((self.vit.forward_head(last, pre_logits=True), torch.cat(statistics, 1)))
        subject, style = (torch.cat(part) for part in zip(*found))
        return subject, style

    def forward(self, images: Tensor) -> Tensor:
        """Subject features, as torchmetrics asks for them: of uint8 images."""
        return self.both(images.float() / 255)[0]


class Judge:
    """Style and category of drawings by logistic regressions over frozen features.

    Trained on drawings of the training identities in all three styles, without the identities in `without`: those
    that were tuned on. What it makes of real drawings of the test identities is the ceiling of any score.
    """

    def __init__(self, size: int, without: Sequence[int] = ()) -> None:
        """Args:
        size: height and width of the drawings to judge; training drawings are seen at that size.
        without: identities left out of the evaluators' training.
        """
        self.features, self.size = Features(), size
        subjects, styles, categories, names = [], [], [], []
        for number, style in enumerate(STYLES):
            drawn = emoji(style, "train", size)
            kept = ~torch.isin(drawn.identity, torch.tensor(sorted(without), dtype=torch.long))
            subject, low = self.features.both(drawn.rgb()[kept].float() / 255)
            subjects.append(subject)
            styles.append(low)
            categories.append(drawn.labels[kept])
            names.append(torch.full((int(kept.sum()),), number))
        self.classes = drawn.classes
        self._category = regression(torch.cat(subjects), torch.cat(categories), len(self.classes))
        self._style = regression(torch.cat(styles), torch.cat(names), len(STYLES))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the style (of `STYLES`) and of the category of images [B, 3, H, W] in [0, 1]."""
        subject, low = self.features.both(images)
        return self._style(low).argmax(1), self._category(subject).argmax(1)

    def accuracy(self, images: Tensor, style: str, categories: Tensor) -> dict[str, float]:
        """Shares of images taken for the style, and for the category their prompt asked for."""
        styles, found = self(images)
        return {
            "style": float((styles == STYLES.index(style)).float().mean()),
            "caption": float((found == categories).float().mean()),
        }

    def kid(self, images: Tensor, real: Tensor) -> tuple[float, float]:
        """Kernel distance between drawn and real images over the embedded ViT's features: mean and spread.

        Unbiased at small n, unlike FID. It compares on these features only: no Inception network is at work.
        """
        size = min(len(images), len(real))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = KernelInceptionDistance(self.features, subsets=100, subset_size=max(2, size // 2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for batch, is_real in ((real, True), (images, False)):
                metric.update((batch.clamp(0, 1) * 255).round().to(torch.uint8), real=is_real)
            mean, spread = metric.compute()
        return float(mean), float(spread)


def regression(features: Tensor, labels: Tensor, classes: int, penalty: float = 1e-2) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features [n, d], to its optimum by L-BFGS; gives logits."""
    with torch.inference_mode(False), torch.enable_grad():  # a test runs in inference mode
        middle, spread = features.mean(0), features.std(0) + 1e-5
        x, labels = (features - middle) / spread, labels.clone()
        weight = torch.zeros(x.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, labels) + penalty * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    fixed, start = weight.detach(), bias.detach()
    return lambda given: (given - middle) / spread @ fixed + start

"""The evaluator of emoji: which style and which category, by regressions over the embedded ViT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from mmpeft.diffusion.style.judge import Judge
from mmpeft.embedded import emoji
from mmpeft.embedded.emoji import STYLES
from mmpeft.embedded.store import WEIGHTS, read_card, read_weights

LOW_BLOCKS = (0, 2)
"""Blocks whose statistics over patches tell the style; the last one tells the subject."""


class Features(nn.Module):
    """The embedded ViT's features of drawings: of the subject [B, 256], and statistics that tell the style."""

    def __init__(self) -> None:
        super().__init__()
        architecture = read_card(WEIGHTS / "vit_emoji.json")["architecture"]
        self.size = int(architecture["img_size"])
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


class EmojiJudge(Judge):
    """Style and category of drawings by logistic regressions over frozen features.

    Trained on drawings of the training identities in all three styles, without the identities in `without`: those
    that were tuned on.
    """

    def __init__(self, size: int, style: str, without: Sequence[int] = ()) -> None:
        """
        Args:
            size: height and width of the drawings to judge; training drawings are seen at that size.
            style: the one that is asked for.
            without: identities left out of the evaluators' training.
        """
        self.features: Features = Features()
        self.style = STYLES.index(style)
        subjects, styles, categories, names = [], [], [], []
        for number, drawn_by in enumerate(STYLES):
            drawn = emoji(drawn_by, "train", size)
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

    def accuracy(self, images: Tensor, prompts: Sequence[str], labels: Tensor | None = None) -> dict[str, float]:
        """Shares of images taken for the style, and for the category their prompt is of."""
        styles, found = self(images)
        scores = {"style": float((styles == self.style).float().mean())}
        if labels is not None:
            scores["caption"] = float((found == labels).float().mean())
        return scores


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
            loss.backward()
            return loss

        optimizer.step(closure)
    fixed, start = weight.detach(), bias.detach()
    return lambda given: (given - middle) / spread @ fixed + start

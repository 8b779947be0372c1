"""How unit features of images and of class names become scores: what few-shot methods put behind the towers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError


class Head(nn.Module):
    """`s f tᵀ`: zero-shot classification by class names (Radford et al. 2021), and the base of all heads.

    Shapes: image features f [B, d], text features t [C, d] or one set an image [B, C, d], both of unit length; scores
    [B, C]. Base classes come first in t.
    """

    names_new_classes = True
    """Whether classes without training images get a score."""
    by_image = False
    """Whether the text features depend on the image."""
    keeps_features = False
    """Whether scores are made of the features of the training images, which must not change then."""

    def start(self, text: Tensor, base: int, words: int) -> None:
        """Build what trains, from the frozen text features [C, d] of all classes and the width of word embeddings."""

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """See the unit features [n, d] of the training images, once, before training."""

    def shift(self, image: Tensor) -> Tensor:
        """What the context of every class moves by for each image, [B, 1, words] (heads that are `by_image`)."""
        raise NotImplementedError

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        if text.dim() == 3:
            return scale * torch.einsum("bd,bcd->bc", image, text)
        return scale * image @ text.t()

    def tune(self, image: Tensor, text: Tensor, labels: Tensor, scale: Tensor) -> None:
        """Choose by validation images what no gradient chooses, after training."""


class LinearHead(Head):
    """A linear classifier on image features: `s W f + b` for base classes alone, W from zero or from the texts."""

    names_new_classes = False

    def __init__(self, from_text: bool = False) -> None:
        super().__init__()
        self.from_text = from_text

    def start(self, text: Tensor, base: int, words: int) -> None:
        self.weight = nn.Parameter(text[:base].clone() if self.from_text else torch.zeros_like(text[:base]))
        self.bias = nn.Parameter(torch.zeros(base))

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        scores = scale * image @ self.weight.t() + self.bias
        return F.pad(scores, (0, text.shape[-2] - len(self.bias)), value=float("-inf"))


class ClipAdapter(Head):
    """`f' = r relu(W₂ relu(W₁ f)) + (1 − r) f`, then zero-shot (Gao et al., arXiv:2110.04544). Parameters: `2 d²/k`."""

    def __init__(self, ratio: float = 0.2, reduction: int = 4) -> None:
        super().__init__()
        if not 0 <= ratio <= 1 or reduction < 1:
            raise ConfigError(f"ClipAdapter: ratio is in [0, 1] and reduction >= 1, got {ratio} and {reduction}")
        self.ratio, self.reduction = ratio, reduction

    def start(self, text: Tensor, base: int, words: int) -> None:
        width = text.shape[1]
        self.down = nn.Linear(width, width // self.reduction, bias=False)
        self.up = nn.Linear(width // self.reduction, width, bias=False)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        adapted = self.ratio * self.up(self.down(image).relu()).relu() + (1 - self.ratio) * image
        return super().forward(F.normalize(adapted, dim=-1), text, scale)


class TaskRes(Head):
    """`t' = t + α x` with x [C, d] from zero (arXiv:2211.10277); new classes keep their t. Parameters: `C d`."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha

    def start(self, text: Tensor, base: int, words: int) -> None:
        self.residual = nn.Parameter(torch.zeros_like(text[:base]))

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        new = text.shape[0] - len(self.residual)
        moved = text + self.alpha * F.pad(self.residual, (0, 0, 0, new))
        return super().forward(image, F.normalize(moved, dim=-1), scale)


class TipAdapter(Head):
    """`s f tᵀ + α exp(−β (1 − f Kᵀ)) V`: keys K [n, d] are training features, values V their classes.

    Zhang et al., arXiv:2111.03930. Training-free, or with `train` the keys train (Tip-Adapter-F). After that α and β
    are chosen on the validation images, by a grid of `steps` values each up to `reach`.
    """

    keeps_features = True
    strength: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, train: bool = False, alpha: float = 1.0, beta: float = 5.5, steps: int = 20) -> None:
        super().__init__()
        self.train_keys, self.steps = train, steps
        self.register_buffer("strength", torch.tensor([alpha, beta]))

    reach = (7.0, 10.0)

    def start(self, text: Tensor, base: int, words: int) -> None:
        self.base = base

    def remember(self, features: Tensor, labels: Tensor) -> None:
        values = F.one_hot(labels, self.base).to(features.dtype)
        self.register_buffer("values", values)
        if self.train_keys:
            self.keys = nn.Parameter(features.clone())
        else:
            self.register_buffer("keys", features.clone())

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        alpha, beta = self.strength
        found: Tensor = super().forward(image, text, scale) + alpha * self.cache(image, beta, text.shape[-2])
        return found

    def cache(self, image: Tensor, beta: Tensor, classes: int) -> Tensor:
        """`exp(−β (1 − f Kᵀ)) V`, zero for classes without keys, [B, C]."""
        near: Tensor = torch.exp(beta * (image @ self.keys.t() - 1)) @ self.values
        return F.pad(near, (0, classes - self.base))

    def tune(self, image: Tensor, text: Tensor, labels: Tensor, scale: Tensor) -> None:
        known = labels < self.base
        image, text, labels = image[known], text[: self.base], labels[known]
        plain, best = super().forward(image, text, scale), -1.0
        for beta in torch.linspace(self.reach[1] / self.steps, self.reach[1], self.steps, device=image.device):
            near = self.cache(image, beta, self.base)
            for alpha in torch.linspace(self.reach[0] / self.steps, self.reach[0], self.steps, device=image.device):
                right = float(((plain + alpha * near).argmax(1) == labels).float().mean())
                if right > best:
                    best = right
                    self.strength.copy_(torch.stack([alpha, beta]))


class CoCoOp(Head):
    """`[V + π(f)]`: a meta-network `d → d/16 → words` moves the learned context by the image (arXiv:2203.05557).

    Goes with the method `CoOp`. The text tower runs once an image and class.
    """

    by_image = True

    def __init__(self, reduction: int = 16) -> None:
        super().__init__()
        self.reduction = reduction

    def start(self, text: Tensor, base: int, words: int) -> None:
        width = text.shape[1]
        hidden = max(1, width // self.reduction)
        self.meta = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, words))

    def shift(self, image: Tensor) -> Tensor:
        moved: Tensor = self.meta(image)
        return moved[:, None]

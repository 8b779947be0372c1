"""Heads of a bank's entries: linear, cosine to class means, ridge regression on random features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, DataError, nearest
from mmpeft.hosting.values import unfit
from mmpeft.types import Facts, Json

LAMBDAS = tuple(10.0**power for power in range(-8, 9))


class Head(nn.Module):
    """Scores [B, n] of features [B, d] for the classes named in `labels` [n], in that order."""

    labels: Tensor

    def __init__(self, width: int, labels: Iterable[int] = ()) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("labels", torch.tensor(list(labels), dtype=torch.int64))

    def spec(self) -> Json:
        """What `head_from` needs beside the tensors."""
        return {"kind": type(self).__name__, "width": self.width}

    def columns(self, labels: Tensor) -> Tensor:
        """The column of each label.

        Raises:
            DataError: a label is none of this head's classes.
        """
        if labels.is_floating_point() or labels.dim() != 1:
            raise DataError(f"expected integer labels [B], got {labels.dtype} {tuple(labels.shape)}")
        match = labels[:, None] == self.labels.to(labels.device)
        known = match.any(1)
        if not known.all():
            raise DataError(
                f"label {int(labels[~known][0])} is outside this task: its classes are {self.labels.tolist()}"
            )
        return match.int().argmax(1)

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if not len(features):
            raise DataError("there are no samples to fit the head on")
        if features.shape != (len(labels), self.width):
            raise DataError(
                f"expected features [{len(labels)}, {self.width}] for {len(labels)} labels, got {tuple(features.shape)}"
            )
        if not torch.isfinite(features).all():
            raise DataError("the features to fit the head on hold NaN or infinity")

    def _extend(self, labels: Tensor) -> None:
        """Add the classes not seen yet, in ascending order."""
        fresh = [int(label) for label in labels.unique() if label not in self.labels]
        self.labels = torch.cat([self.labels, self.labels.new_tensor(fresh)])


class LinearHead(Head):
    """`W f + b` for a fixed set of classes, trained by gradients."""

    def __init__(self, width: int, labels: Iterable[int] = ()) -> None:
        super().__init__(width, labels)
        if not len(self.labels):
            raise ConfigError("a linear head needs the classes of its task")
        self.linear = nn.Linear(width, len(self.labels))

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.linear(features)
        return scores


class PrototypeHead(Head):
    """`cos(f, p_c)`, `p_c` the mean feature of class c. Classes may come at any time and never change each other."""

    means: Tensor

    def __init__(self, width: int, labels: Iterable[int] = ()) -> None:
        super().__init__(width, labels)
        self.register_buffer("means", torch.zeros(len(self.labels), width))

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Set the means of all classes among `labels` from all their samples."""
        self._check(features, labels)
        self._extend(labels)
        columns = self.columns(labels)
        self.means = F.pad(self.means, (0, 0, 0, len(self.labels) - len(self.means)))
        for column in columns.unique():
            self.means[column] = features[columns == column].mean(0)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) @ F.normalize(self.means, dim=-1).T


class RidgeHead(Head):
    """`W h` with `h = relu(f R)`, `W = (G + λI)⁻¹ Q`, `G = Σ hᵀh`, `Q = Σ hᵀy` over all tasks (arXiv:2307.02251).

    R [d, M] is random and fixed by `seed`; `M = 0` takes the features as they are. λ is the one with the least squared
    error on a fifth of the current task when fitted on all tasks before and the other four fifths.
    """

    projection: Tensor
    gram: Tensor
    target: Tensor
    weight: Tensor

    def __init__(self, width: int, labels: Iterable[int] = (), size: int = 2000, seed: int = 0) -> None:
        super().__init__(width, labels)
        if size < 0:
            raise ConfigError(f"size is the number of random features >= 0, got {size}")
        self.size, self.seed, self.strength = size, seed, 0.0
        generator = torch.Generator().manual_seed(seed)
        inner = size or width
        self.register_buffer("projection", torch.randn(width, size, generator=generator), persistent=False)
        self.register_buffer("gram", torch.zeros(inner, inner))
        self.register_buffer("target", torch.zeros(inner, len(self.labels)))
        self.register_buffer("weight", torch.zeros(inner, len(self.labels)))

    def spec(self) -> Json:
        return {**super().spec(), "size": self.size, "seed": self.seed}

    def project(self, features: Tensor) -> Tensor:
        """`relu(f R)`."""
        return torch.relu(features @ self.projection) if self.size else features

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Add a task's samples and solve again."""
        self._check(features, labels)
        self._extend(labels)
        missing = len(self.labels) - self.target.shape[1]
        self.target = F.pad(self.target, (0, missing))
        h = self.project(features)
        y = F.one_hot(self.columns(labels), len(self.labels)).to(h.dtype)
        order = torch.randperm(len(h), generator=torch.Generator().manual_seed(self.seed)).to(h.device)
        held, rest = order[: len(h) // 5], order[len(h) // 5 :]
        gram, target = self.gram + h[rest].T @ h[rest], self.target + h[rest].T @ y[rest]
        errors = [(float((h[held] @ w - y[held]).square().mean()), s) for s, w in _ridges(gram, target)]
        self.strength = min(errors)[1] if len(held) else LAMBDAS[len(LAMBDAS) // 2]
        self.gram += h.T @ h
        self.target += h.T @ y
        (self.weight,) = (w for _, w in _ridges(self.gram, self.target, (self.strength,)))

    def forward(self, features: Tensor) -> Tensor:
        return self.project(features) @ self.weight


def _ridges(gram: Tensor, target: Tensor, strengths: Sequence[float] = LAMBDAS) -> Iterable[tuple[float, Tensor]]:
    """`(λ, (G + λI)⁻¹ Q)` of each λ, from one eigendecomposition in double precision."""
    values, vectors = torch.linalg.eigh(gram.double())
    turned = vectors.T @ target.double()
    for strength in strengths:
        yield strength, (vectors @ (turned / (values.clamp_min(0) + strength)[:, None])).to(target.dtype)


HEADS: dict[str, type[Head]] = {cls.__name__: cls for cls in (LinearHead, PrototypeHead, RidgeHead)}


def head_from(spec: Facts, tensors: Mapping[str, Tensor]) -> Head:
    """The head that `spec()` and `state_dict()` described.

    Raises:
        AdapterFileError: an unknown kind, or tensors that do not fit it.
    """
    kind = str(spec.get("kind"))
    if kind not in HEADS:
        raise AdapterFileError(f"unknown head {kind!r}; known: {', '.join(HEADS)}.{nearest(kind, HEADS)}")
    try:
        options = {key: value for key, value in spec.items() if key != "kind"}
        head = HEADS[kind](labels=tensors["labels"].tolist(), **options)
        head.load_state_dict(dict(tensors))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"the tensors of a {kind} do not fit it: {error}") from error
    for name, own in head.state_dict().items():
        why = unfit(tensors[name], own.dtype)
        if why:
            raise AdapterFileError(f"{name} of a {kind} {why}")
    return head

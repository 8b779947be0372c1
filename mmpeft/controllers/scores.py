"""How much each entry of a tensor matters: what selections and budgets are decided by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves, tree_map

from mmpeft.errors import ConfigError, DataError, Refused
from mmpeft.hosting.quantized import QuantizedWeight
from mmpeft.types import Batch, Leaf, Transform

Score = Literal["gradient2", "fisher", "expected_fisher", "taylor", "signed", "magnitude", "small", "random"]
SCORES: dict[str, str] = {
    "gradient2": "Σ_batches (∂L/∂w)², the gradient averaged over each batch (SPT, Child-tuning D)",
    "fisher": "Σ_samples (∂ log p(y|x)/∂w)², one sample at a time (FISH mask)",
    "expected_fisher": "Σ_samples Σ_y p(y|x) (∂ log p(y|x)/∂w)² over all classes",
    "taylor": "|Σ w ∂L/∂w|, first-order change of the loss when the entry is removed",
    "signed": "|Σ ∂L/∂w|, signs kept until the end (second-order approximation, SAM)",
    "magnitude": "|w|",
    "small": "1/|w|, so that the smallest entries come first (PaFi)",
    "random": "uniform noise, the baseline every score must beat",
}
DATA_FREE = ("magnitude", "small", "random")

Loss = Callable[[nn.Module, Batch], Tensor]
Tensors = dict[str, Tensor]


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of `(inputs, labels)`, or the loss a model computes itself from keyword arguments.

    Raises:
        DataError: the batch is neither.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        raise DataError(f"{type(model).__name__} gives no loss for {sorted(batch)}; add labels, or pass loss=")
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return F.cross_entropy(model(batch[0]).float(), batch[1])
    raise DataError(f"expected (inputs, labels) or a mapping of arguments, got {type(batch).__name__}; pass loss=")


def score(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    kind: Score,
    data: Iterable[Batch] = (),
    loss: Loss = default_loss,
    batches: int | None = None,
) -> dict[str, Tensor]:
    """Non-negative fp32 scores of every entry of the model's own `tensors`; the model is left as it was.

    Gradients are taken in evaluation mode, with no tensor updated, and summed over processes.

    Raises:
        ConfigError: unknown score. DataError: no batch to score on.
    """
    if kind not in SCORES:
        raise ConfigError(f"unknown score {kind!r}; known: {', '.join(SCORES)}")
    if kind == "random":
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        return {n: torch.rand(t.shape, generator=generator).to(t.device) for n, t in tensors.items()}
    if kind in DATA_FREE:
        sizes = {name: tensor.detach().float().abs() for name, tensor in tensors.items()}
        return sizes if kind == "magnitude" else {n: t.clamp_min(1e-30).reciprocal() for n, t in sizes.items()}
    total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tensors.items()}
    seen = 0
    with scoring(model, tensors.values()):
        for batch in _batches(data, batches, kind):
            keep = kind == "expected_fisher"  # all classes of a sample share one forward pass
            for weight, value in _losses(model, batch, loss, kind):
                seen += 1
                grads = torch.autograd.grad(value, list(tensors.values()), allow_unused=True, retain_graph=keep)
                for name, grad in zip(tensors, grads):
                    if grad is not None:
                        total[name] += grad.float() if kind in ("taylor", "signed") else grad.float().square() * weight
    if not seen:
        raise DataError(f"{kind!r} scores need data, got no batch")
    for value in total.values():
        summed(value)
    if kind == "taylor":
        return {name: (value * tensors[name].detach().float()).abs() for name, value in total.items()}
    return {name: value.abs() for name, value in total.items()}


def _batches(data: Iterable[Batch], limit: int | None, kind: str) -> Iterator[Batch]:
    chosen = islice(data, limit)
    count = limit if limit is not None else len(data) if isinstance(data, Sized) else None
    yield from track(chosen, f"scoring ({kind})", total=count, transient=True)


def _losses(model: nn.Module, batch: Batch, loss: Loss, kind: str) -> Iterator[tuple[Tensor | float, Tensor]]:
    """`(weight, loss)` of what is squared by itself: a batch, a sample, or a sample with one of its classes."""
    if kind not in ("fisher", "expected_fisher"):
        yield 1.0, loss(model, batch)
        return
    for sample in samples(batch):
        if kind == "fisher":
            yield 1.0, loss(model, sample)
            continue
        if not isinstance(sample, list | tuple):
            raise DataError("expected_fisher needs batches (inputs, labels) and a model that gives class scores")
        log_p = model(sample[0]).float().log_softmax(-1)[0]
        for value in log_p:
            yield value.detach().exp(), value


def samples(batch: Batch) -> Iterator[Batch]:
    """A batch row by row, each row a batch of one; what has not as many rows as most tensors goes with every one."""
    lengths = Counter(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    rows = lengths.most_common(1)[0][0] if lengths else 0

    def own(index: int) -> Transform:
        def take(value: Leaf) -> Leaf:
            whole = not isinstance(value, Tensor) or not value.dim() or len(value) != rows
            return value if whole else value[index : index + 1]

        return take

    for row in range(rows):
        yield tree_map(own(row), batch)


def summed(tensor: Tensor) -> Tensor:
    """Summed over processes, in place."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def check_gradients(tensors: Sequence[Tensor]) -> None:
    """Raise Refused where some tensors are quantised, through which no gradient goes."""
    packed = sum(isinstance(tensor, QuantizedWeight) for tensor in tensors)
    if packed:
        raise Refused(
            f"{packed} of {len(tensors)} tensors are quantised, which have no gradient to score: leave them out "
            "with `at`, or choose by what needs none (random, magnitude)"
        )


@contextmanager
def scoring(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Evaluation mode, and gradients for these tensors alone; modes, flags, `.grad` and random state come back."""
    tensors = list(tensors)
    check_gradients(tensors)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.__dict__["training"] = training  # no call of a class's own, which an interrupt could end
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def dense_change(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    data: Iterable[Batch],
    loss: Loss = default_loss,
    *,
    steps: int,
    lr: float,
    l1: float = 0.0,
) -> dict[str, Tensor]:
    """`|θ1 - θ0|` after `steps` of AdamW on all of `tensors`, data repeated as needed; then θ0 comes back, bit for bit.

    Raises:
        DataError: no batch.
    """
    origin = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    size = sum(tensor.numel() for tensor in tensors.values())

    def endless() -> Iterator[Batch]:
        while True:
            seen = False
            for batch in data:
                seen = True
                yield batch
            if not seen:
                raise DataError("dense fine-tuning needs data, got no batch")

    with scoring(model, tensors.values()):
        optimizer = torch.optim.AdamW(tensors.values(), lr=lr, weight_decay=0.0)
        try:
            for batch in _batches(endless(), steps, "dense fine-tuning"):
                optimizer.zero_grad()
                value = loss(model, batch)
                if l1:
                    change = sum((tensor - origin[name]).abs().sum() for name, tensor in tensors.items())
                    value = value + l1 * change / size
                torch.autograd.backward(value)
                for tensor in tensors.values():
                    if tensor.grad is not None and _processes() > 1:
                        summed(tensor.grad).div_(_processes())
                optimizer.step()
            return {name: (tensor.detach() - origin[name]).float().abs() for name, tensor in tensors.items()}
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(origin[name])
                    tensor.grad = None


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1

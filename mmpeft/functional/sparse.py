"""Sparse updates of a frozen weight: some entries, kept as compressed rows."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpeft.types import Ctx

warnings.filterwarnings("ignore", message="Sparse CSR tensor support")


def compressed(indices: Int[Tensor, " k"], columns: int, rows: int) -> tuple[Int[Tensor, " r"], Int[Tensor, " k"]]:
    """Row pointers [rows + 1] and columns of ascending flat indices into a [rows, columns] matrix."""
    row = torch.div(indices, columns, rounding_mode="floor")
    pointers = torch.zeros(rows + 1, dtype=torch.int64, device=indices.device)
    pointers[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return pointers, indices % columns


def sparse_apply(
    x: Float[Tensor, "*batch i"],
    values: Float[Tensor, " k"],
    pointers: Int[Tensor, " r"],
    columns: Int[Tensor, " k"],
) -> Float[Tensor, "*batch o"]:
    """`Δ x` for a sparse `Δ` [o, i] in compressed rows, differentiable in `x` and `values`.

    Costs `O(N k)` and keeps `x` alone: no dense [o, i] tensor is formed, no weight is copied. The gradient of the
    values is the product `dyᵀ x` sampled at the k places.
    """
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _product(flat, values, pointers, columns)
    return y.reshape(*x.shape[:-1], -1)


@torch.library.custom_op("mmpeft::sparse_product", mutates_args=())
def _product(flat: Tensor, values: Tensor, pointers: Tensor, columns: Tensor) -> Tensor:
    """`Δ x` for each row of `flat` [N, i]; one opaque operation, so that a compiled graph can hold it."""
    wide = _arithmetic(flat)
    with torch.autocast(flat.device.type, enabled=False):
        matrix = _matrix(pointers, columns, values.to(wide), flat.shape[1])
        y = matrix @ flat.to(wide).t().contiguous()  # tokens contiguous: four times as fast
    return y.t().to(flat.dtype, copy=True, memory_format=torch.contiguous_format)


@torch.library.custom_op("mmpeft::sparse_gradients", mutates_args=())
def _gradients(grad: Tensor, flat: Tensor, values: Tensor, pointers: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `flat` and of `values`."""
    wide = _arithmetic(flat)
    with torch.autocast(flat.device.type, enabled=False):
        grad = grad.to(wide).t().contiguous()  # [o, N]
        matrix = _matrix(pointers, columns, values.to(wide), flat.shape[1])
        grad_flat = (matrix.t() @ grad).t().to(flat.dtype, copy=True, memory_format=torch.contiguous_format)
        places = _matrix(pointers, columns, torch.zeros_like(values, dtype=wide), flat.shape[1])
        found = torch.sparse.sampled_addmm(places, grad, flat.to(wide), beta=0.0)
    return grad_flat, found.values().to(values.dtype, copy=True)


@_product.register_fake
def _(flat: Tensor, values: Tensor, pointers: Tensor, columns: Tensor) -> Tensor:
    return flat.new_empty(flat.shape[0], pointers.shape[0] - 1)


@_gradients.register_fake
def _(grad: Tensor, flat: Tensor, values: Tensor, pointers: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(flat), torch.empty_like(values)


def _setup(ctx: Ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_flat, grad_values = _gradients(grad, *ctx.saved_tensors)
    return grad_flat, grad_values, None, None


_product.register_autograd(_backward, setup_context=_setup)


def _matrix(pointers: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    return torch.sparse_csr_tensor(pointers, columns, values, (len(pointers) - 1, width), check_invariants=False)


def _arithmetic(x: Tensor) -> torch.dtype:
    """Sparse products exist in fp32 and fp64 everywhere, in half precision on few devices."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scatter_add(base: Tensor, indices: Int[Tensor, " k"], values: Float[Tensor, " k"]) -> Tensor:
    """`θ0 + M ⊙ δ` as a new tensor: `values` added at flat `indices` of a contiguous `base`."""
    flat = base.reshape(-1)
    return flat.scatter_add(0, indices, values.to(base.dtype)).view(base.shape)

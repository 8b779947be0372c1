"""Updates whose ΔW the base's weight tells: multiplied out on it, they are ordinary layers.

    DoRA for ComfyUI       m ‖W + sBA‖ / ‖W‖ is the length that trained (see `dora_out`)
    DoRA by input column   (W + sBA) · m_i / ‖(W + sBA)_{·i}‖ − W
    OFT                    ρ ⊙ (R W) − W, R block-diagonal of (I + Q)(I − Q)⁻¹, Q = B − Bᵀ; alpha · rows bounds ‖Q‖
    GLoRA                  s (W A₁ A₂ + B₁ B₂)
    a whole weight         V − W

Conventions of github.com/KohakuBlueleaf/LyCORIS, which writes such files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmpeft.errors import AdapterFileError
from mmpeft.formats.content import Based, Layer, Shift
from mmpeft.formats.dora_out import growth
from mmpeft.formats.lycoris import multiplied

COLUMNS = "DoRA by input column"
COMFY = "DoRA with ComfyUI's lengths"
FOR_COMFY = "dora_scale_for"
"""Key of a file's metadata whose lengths of DoRA are ComfyUI's."""
Own = Mapping[str, Tensor]


def on_base(item: Based, weight: Tensor, where: object) -> Layer | Shift:
    """The layer (of a norm's weight the shift) that an update is on this weight [o, i, k...].

    Raises:
        AdapterFileError: the tensors do not fit the weight.
    """
    own = {name: tensor.detach().float() for name, tensor in item.tensors.items()}
    weight = weight.detach().float().cpu()
    if item.kind == COMFY:
        return _from_comfy(item, own, weight)
    try:
        delta = DELTAS[item.kind](own, weight)
    except (RuntimeError, KeyError) as error:
        shapes = {name: list(tensor.shape) for name, tensor in item.tensors.items()}
        raise AdapterFileError(
            f"{where}: the tensors of {item.path}, {shapes}, are no {item.kind} of a weight {list(weight.shape)}; the "
            "adapter was made for another base, or the file is a part"
        ) from error
    if delta.dim() < 2:
        return Shift(item.path, "weight", delta, item.component, item.flat)
    down, up = multiplied(delta)
    return Layer(item.path, down, up, float(len(down)), None, item.component, item.flat, factor=item.kind)


def _from_comfy(item: Based, own: Own, weight: Tensor) -> Layer:
    rank = float(len(own["down"]))
    layer = Layer(item.path, own["down"], own["up"], rank, own["magnitude"].flatten(), item.component, item.flat)
    return replace(layer, magnitude=own["magnitude"].flatten() * growth(layer, weight))


def _columns(own: Own, weight: Tensor) -> Tensor:
    whole = weight + (own["up"] @ own["down"].flatten(1)).view(weight.shape)
    lengths = whole.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.dim() - 2))
    found: Tensor = whole * (own["columns"].view(lengths.shape) / lengths) - weight
    return found


def _oft(own: Own, weight: Tensor) -> Tensor:
    blocks = own["oft_blocks"]
    count, size, _ = blocks.shape
    q, one = blocks - blocks.mT, torch.eye(size)
    bound = float(own["alpha"]) * len(weight) if "alpha" in own else 0.0
    if bound > 0 and q.norm() > bound:
        q = q * (bound / q.norm())
    turn = (one + q) @ torch.linalg.inv(one - q)
    turned = torch.einsum("knm,kn...->km...", turn, weight.view(count, size, *weight.shape[1:])).reshape(weight.shape)
    if "rescale" in own:
        turned = own["rescale"].view(-1, *[1] * (weight.dim() - 1)) * turned
    return turned - weight


def _glora(own: Own, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (own[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[1] != len(a2) or len(a1) != weight.shape[1] or b1.shape[1] != len(b2):
        raise RuntimeError("not as LyCORIS writes it")
    scale = float(own["alpha"]) / len(a2) if "alpha" in own else 1.0
    turned = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    return (turned + (b1 @ b2).view(weight.shape)) * scale


def _set(own: Own, weight: Tensor) -> Tensor:
    if own["set_weight"].numel() != weight.numel():
        raise RuntimeError("another size")
    return own["set_weight"].view(weight.shape) - weight


DELTAS: dict[str, Callable[[Own, Tensor], Tensor]] = {
    COLUMNS: _columns,
    "OFT": _oft,
    "GLoRA": _glora,
    "weight": _set,
}

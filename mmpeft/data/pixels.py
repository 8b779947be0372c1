"""Pictures as tensors, and tensors as files."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def png_of_pixels(image: Tensor) -> bytes:
    """A PNG of an image in [0, 1], float [3, H, W]."""
    out = io.BytesIO()
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(out, "PNG")
    return out.getvalue()

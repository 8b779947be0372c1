"""One model of each of timm's families (a module of `timm.models`), the one with the fewest parameters."""

from __future__ import annotations

from functools import cache
from typing import Any

import timm
import torch
from torch import nn

SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""The smallest variant of each family; counted where a newer timm has a family that is not listed."""

_DEPTH = (
    "beit", "cait", "convit", "deepseek_vit", "deit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit", "tnt", "visformer",
    "vision_transformer_hybrid", "vision_transformer_sam", "xcit",
)  # fmt: skip
_DEPTHS = (
    "davit", "edgenext", "inception_next", "pvt_v2", "swin_transformer", "swin_transformer_v2",
    "swin_transformer_v2_cr", "tiny_vit", "twins",
)  # fmt: skip
_LAYERS = ("res2net", "senet", "sequencer", "sknet", "tresnet")
CHEAPER: dict[str, dict[str, Any]] = {
    **{name: {"depth": 2} for name in _DEPTH},
    **{name: {"depths": (1, 1, 2, 1)} for name in _DEPTHS},
    **{name: {"layers": (1, 1, 2, 1)} for name in _LAYERS},
}
"""What makes a family's smallest variant shallow without changing how it is built."""

SIDE = 96
"""Of a picture for families that take any."""
SIDES: dict[str, int] = {
    **dict.fromkeys(("inception_resnet_v2", "inception_v3", "inception_v4", "nasnet", "pnasnet", "xception"), 128),
    "byoanet": 256,
    "davit": 112,
    "deepseek_vit": 126,
    "focalnet": 112,
    "hieradet_sam2": 224,
    "mobilenetv5": 128,
    "qwen3_vit": 128,
    "tiny_vit": 112,
}
"""Other sides that suit a family's windows, grids or pools."""


def names() -> list[str]:
    """Families of the installed timm."""
    return sorted(timm.list_modules())


def build(name: str) -> nn.Module:
    """The family's smallest model with random weights, the same in every call."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(variant(name), pretrained=False, **CHEAPER.get(name, {}))
    known: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[call-overload]
    if not known.get("fixed_input_size"):
        side = min(SIDES.get(name, SIDE), known["input_size"][-1])
        model.pretrained_cfg = {**known, "input_size": (3, side, side)}  # type: ignore[assignment]
    return model


@cache
def variant(name: str) -> str:
    """Name of the family's smallest model."""
    listed = timm.list_models(module=name)
    return SMALLEST[name] if SMALLEST.get(name) in listed else min(listed, key=_size)


def _size(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())

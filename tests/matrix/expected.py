"""Cells that must be refused, and a word of the reason; every other cell must work."""

from __future__ import annotations

from fnmatch import fnmatch

from tests.matrix.families import diffusers, few_bits, timm

WINDOWS = "window"
NO_KEY_BIAS = "no state dict"  # the key bias is a buffer of zeros that is never saved
NO_SUBLAYER = "matches no site"  # one projection serves attention and the feed-forward network
FEW_BITS = tuple(few_bits.FAMILIES)
TEXT = ("llama", "gemma2", "phi", "phi3", "gpt2", "gpt_neox", "bert", "t5", *FEW_BITS)
DIFFUSERS = tuple(diffusers.FAMILIES)
NO_MLP = ("AdaptFormer", "ParallelAdapter", "Pfeiffer", "DoRA[where]", "LoRA[at=mlp.*,embed]")
NO_MLP += ("AdapterDrop", "AdapterFusion")
PROMPTS = ("PromptTuning", "PTuning")
VISION = tuple(timm.FAMILIES)
WHOLE = ("Full", "LastBlocks", "DiffPruning", "ChildTuningF")
SCORED = ("ChildTuningD", "FishMask", "LTSFT", "SAMMask", "SPT")
FOLDED = ("*oRA*", "DiffFit", "IA3", "KronA", "LoHa", "LoKr", "PaFi", "RandomMask", "SSF")
WORDLESS = ("hf_vit", *VISION, *DIFFUSERS, "tnt", "resnet", "mobilevitv2", "helios")
PAIRS = ("hf_clip", "hf_siglip", "open_clip", "open_clip_timm_hf", "coca", "owlv2")
REFUSED = {
    ("VPT*", "beit"): "relative-position bias",
    ("VPT*", "swin*"): WINDOWS,
    ("VPT*", "convnext"): "no token sequence",
    ("AdaptFormer", "convnext"): "residual stream",
    ("AdaptFormer", "vit_parallel"): NO_SUBLAYER,
    ("Houlsby", "vit_parallel"): NO_SUBLAYER,
    ("VLAdapter", "vit_parallel"): NO_SUBLAYER,
    ("Pfeiffer", "vit_parallel"): NO_SUBLAYER,
    ("AdapterDrop", "vit_parallel"): NO_SUBLAYER,
    ("AdapterFusion", "vit_parallel"): NO_SUBLAYER,
    ("ParallelAdapter", "vit_parallel"): NO_SUBLAYER,
    ("LoRA+BitFit+Houlsby", "vit_parallel"): NO_SUBLAYER,
    ("DoRA[where]", "convnext"): "matches no site",
    **{("VPT*", family): "made before the blocks" for family in TEXT},
    **{(method, "convnext"): "'kv' .*matches no site" for method in ("PrefixTuning", "PTuningV2", "LLaMAAdapter")},
    **{("CoDA", family): "rotary positions" for family in ("eva02*", "dinov3", "rope_vit")},
    ("CoDA", "beit"): "relative-position bias",
    ("CoDA", "swin*"): WINDOWS,
    ("CoDA", "convnext"): "no token sequence",
    ("CoDA", "unet2d"): "work on maps",
    **{("CoDA", family): "made before the blocks" for family in TEXT},
    **{("CoDA", family): "two streams" for family in ("sd3", "flux")},
    **{("LST", family): "look at another tower" for family in ("coca", "t5")},
    ("LST", "s*_unet"): "maps and blocks on tokens",
    **{("LST", family): "two streams" for family in ("sd3", "flux")},
    **{(method, "vit_parallel"): NO_SUBLAYER for method in ("KronAB", "Compacter*", "UniPELT", "MAM")},
    **{(method, "unet2d"): "'mlp' .*matches no site" for method in ("KronAB", "CompacterPlus", "UniPELT", "MAM")},
    ("UniPELT", "convnext"): "'kv' .*matches no site",
    ("MAM", "convnext"): "'kv' .*matches no site",
    ("AdapterPlus", "sd3"): "two streams",
    ("AdapterPlus", "flux"): "two streams",
    ("VPT*", "sd3"): "two streams",
    ("VPT*", "flux"): "two streams",
    ("VPT*", "unet2d"): "work on maps",
    ("VPT", "s*_unet"): "consecutive depths",
    ("NormTuning", "dit"): "finds no tensor",
    ("NormTuning", "pixart"): "finds no tensor",
    **{(method, "unet2d"): "'mlp.*' .*matches no site" for method in NO_MLP},
    **{("LinearProbe", family): "finds no tensor" for family in PAIRS},
    **{("TextualInversion", family): "finds no tensor" for family in WORDLESS},
    **{(method, family): "no embedding of words" for method in PROMPTS for family in WORDLESS},
    **{(method, family): "no way to lengthen" for method in PROMPTS for family in PAIRS},
    **{(method, family): "trained as a whole" for method in WHOLE for family in FEW_BITS},
    **{(method, family): "no gradient to score" for method in SCORED for family in FEW_BITS},
    **{(m, f): "no text tower" for m in ("CoOp*", "MaPLe") for f in (*TEXT, *WORDLESS)},
    **{(method, "tnt"): "two streams" for method in ("AdapterPlus", "LST")},
    **{(method, family): "no anatomy says" for method in ("CoDA", "VPT*") for family in ("tnt", "resnet")},
    **{(method, "mobilevitv2"): "made before the blocks" for method in ("CoDA", "VPT*")},
    **{
        (method, family): "'kv' .*matches no site"
        for method in ("LLaMAAdapter", "MAM", "PTuningV2", "PrefixTuning", "UniPELT")
        for family in ("resnet", "mobilevitv2")
    },
    ("IA3", "resnet"): "'attn.k' .*matches no site",
    ("IA3", "mobilevitv2"): "linear or experts sites",
    ("KronAB", "resnet"): "'mlp' .*matches no site",
    ("SPT", "resnet"): "'attn.*' .*matches no site",
    ("LoRA[at=mlp.*,embed]", "resnet"): "'mlp.*' .*matches no site",
    ("LoRA[at=mlp.*,embed]", "helios"): "'embed' .*matches no site",
    **{("DoRA[where]", family): "'attn.*' .*matches no site" for family in ("resnet", "mobilevitv2")},
    **{(method, "helios"): "'embed' .*matches no site" for method in PROMPTS},
    **{(method, "helios"): "made before the blocks" for method in ("CoDA", "VPT*")},
}
"""(method pattern, family pattern) -> part of the reason."""

UNMERGEABLE = {
    ("SSF", "beit"): NO_KEY_BIAS,
    ("SSF", "eva"): NO_KEY_BIAS,
    ("SSF", "eva02"): NO_KEY_BIAS,
    ("SSF", "rope_vit"): NO_KEY_BIAS,
    ("SSF", "swinv2"): NO_KEY_BIAS,
    **{("LoRA+BitFit+Houlsby", family): "no linear map" for family in FEW_BITS},
    **{(method, family): "no room for an update" for method in FOLDED for family in FEW_BITS},
    **{("SSF", family): "reads no bias" for family in ("llama", "gemma2", "phi3", "t5", "sd3", "flux", "helios")},
}
"""Cells that work and cannot be merged, beyond the methods that never can."""


def reason(table: dict[tuple[str, str], str], label: str, family: str) -> str | None:
    """The expected reason for a cell, or None."""
    return next(
        (why for (m, f), why in table.items() if (label == m or fnmatch(label, m)) and fnmatch(family, f)), None
    )

"""Where open_clip's models can be tuned: CLIP, CustomTextCLIP and CoCa, with any image and text tower.

Registered by class name, so that importing this file imports no open_clip. `nn.MultiheadAttention` calls none
of its projections: its weights are adapted where they are read, q, k, v and out apart. A timm image tower and a
transformers text tower are read by their own anatomies, found through the registry.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmpeft.parts.attention import attend
from mmpeft.sites import Connect, Site, anatomy
from mmpeft.sites.builder import Builder, is_a, nested
from mmpeft.vla.attention import multihead

TEXT = "the causal mask and the pooled position are fixed before the blocks; a prompt in between has no place in them"
COSINE = "open_clip's scaled cosine attention multiplies [B, h, n, d] by torch.bmm, which takes no such tensors"
OPEN_CLIP = "open_clip"


@anatomy(
    f"{OPEN_CLIP}.model.CLIP",
    f"{OPEN_CLIP}.model.CustomTextCLIP",
    f"{OPEN_CLIP}.coca_model.CoCa",
    f"{OPEN_CLIP}.transformer.VisionTransformer",
    f"{OPEN_CLIP}.transformer.TextTransformer",
)
def clip(model: nn.Module) -> list[Site]:
    """A pair of towers, or one of them; CoCa's text decoder is a tower `decoder`."""
    builder = _Builder(model)
    for path, module in list(builder.modules()):
        if is_a(module, "TimmModel"):
            nested(builder, f"{path}.trunk", "image")
        elif is_a(module, "HFTextEncoder"):
            nested(builder, f"{path}.transformer", "text")
        elif is_a(module, "Transformer", "CustomTransformer"):
            builder.stack(path, module)
    embeddings = {path for path, _ in builder.modules() if path.rpartition(".")[2] in ("conv1", "token_embedding")}
    return builder.finish(embed=embeddings)


class _Builder(Builder):
    def outside(self, path: str, around: str) -> str:
        """The tower a module is in: the names of open_clip's own models, or the class of a single tower."""
        first = path.split(".")[0]
        if is_a(self.model, "VisionTransformer", "TextTransformer"):
            return "image" if is_a(self.model, "VisionTransformer") else "text"
        return {"visual": "image", "text_decoder": "decoder", "": ""}.get(first, "text")

    def stack(self, path: str, transformer: nn.Module) -> None:
        """The blocks of one of open_clip's own transformers, cross-attention blocks included."""
        self.tower = self.outside(path, "")
        self.add(f"{path}.resblocks", "stack")
        across: Any = getattr(transformer, "cross_attn", ())
        for depth, block in enumerate(transformer.resblocks):  # type: ignore[arg-type]
            self.residual(f"{path}.resblocks.{depth}", block, depth, "attn")
            if len(across):
                self.residual(f"{path}.cross_attn.{depth}", across[depth], depth, "cross")

    def residual(self, path: str, block: Any, depth: int, role: str) -> None:
        """One residual block: its own site, its two sub-layers and their projections, the tokens it sees."""
        width = int(block.mlp.c_proj.out_features)
        self.block(path, depth, width)
        attention = f"{path}.attn"
        roles = {name: f"{role}.{name}" for name in ("q", "k", "v", "out")}
        self.attention(attention, block.attn, roles, depth)
        self.add(attention, role, depth, width=width, stream=f"{path}.ln_1", out=f"{path}.ls_1")
        heads = int(block.attn.num_heads)
        view = multihead if isinstance(block.attn, nn.MultiheadAttention) else attend
        refuse = COSINE if getattr(block.attn, "logit_scale", None) is not None else ""
        known = {"width": width // heads, "heads": heads, "refuse": refuse}
        self.add(attention, "kv", depth, connect=Connect("", view), **known)
        self.linear(f"{path}.mlp.c_fc", "mlp.up", depth)
        self.linear(f"{path}.mlp.c_proj", "mlp.down", depth)
        self.add(f"{path}.mlp", "mlp", depth, width=width, stream=f"{path}.ln_2", out=f"{path}.ls_2")
        if role == "attn":
            refuse = "" if self.tower == "image" else TEXT
            self.add(path, "tokens", depth, width=width, prefix=1, refuse=refuse)

    def attention(self, path: str, attention: Any, roles: dict[str, str], depth: int) -> None:
        if isinstance(attention, nn.MultiheadAttention):
            self.multihead(path, roles, depth)
            return
        self.in_projection(path, attention, roles, depth)  # open_clip's own, which calls its output projection
        self.linear(f"{path}.out_proj", roles["out"], depth)

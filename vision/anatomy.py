"""Where timm's vision backbones can be tuned: ViT, EVA/DINOv3, BEiT, Swin, SwinV2, ConvNeXt.

Registered by class name, so that importing this file imports no timm. What is said here of a module — that it
is called, that its weight is read, that its input is the residual stream — is checked by running the model in
`tests/unit/test_anatomy_timm.py`.
"""

from __future__ import annotations

from torch import nn

from mmpeft.parts.attention import attend
from mmpeft.sites import Connect, Site, anatomy
from mmpeft.sites.builder import Builder, weight_shape
from mmpeft.vision.attention import cosine

TIMM = "timm.models"
WINDOWS = "attention runs inside fixed windows with a bias for every pair of positions; a prompt has no place in them"
RELATIVE = "the relative-position bias is indexed by a fixed number of tokens; a prompt has no entry in it"
NO_TOKENS = "a convolutional network has no token sequence to put prompts into"
STANDARDISED = "the convolution standardises its weight in every pass; a change of it is no change of the output"
DIFFERENCE = "its output is the difference of two softmaxes over half a head each; a learned key would enter only one"

POST_NORM = {"ResPostBlock", "EvaBlockPostNorm", "SwinTransformerV2Block"}
"""Blocks that normalise a sub-layer's output, so that the sub-layer itself reads the residual stream."""


@anatomy(f"{TIMM}.vision_transformer.VisionTransformer", f"{TIMM}.eva.Eva", f"{TIMM}.beit.Beit")
def plain(model: nn.Module) -> list[Site]:
    """Backbones with one stack of blocks on one sequence of tokens."""
    builder = _Builder(model, "image")
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    rotary = getattr(model, "rope", None) is not None
    for depth, block in enumerate(model.blocks):  # type: ignore[arg-type, union-attr]
        path = f"blocks.{depth}"
        builder.residual(path, block, depth)
        attention = getattr(block, "attn", None)
        biased = getattr(attention, "relative_position_bias_table", None) is not None
        refuse = RELATIVE if biased or getattr(model, "rel_pos_bias", None) is not None else ""
        reader = f"{path}.attn" if rotary else ""
        width = int(model.embed_dim)  # type: ignore[arg-type]
        builder.add(path, "tokens", depth, width=width, prefix=prefix, prefix_reader=reader, refuse=refuse)
    builder.add("blocks", "stack")
    return builder.ends(embed="patch_embed.proj")


@anatomy(f"{TIMM}.swin_transformer.SwinTransformer", f"{TIMM}.swin_transformer_v2.SwinTransformerV2")
def windowed(model: nn.Module) -> list[Site]:
    """Swin and SwinV2: stages of blocks on a grid `[B, H, W, C]`."""
    builder = _Builder(model, "image")
    _stages(builder, model.layers, "layers", refuse=WINDOWS)  # type: ignore[arg-type]
    return builder.ends(embed="patch_embed.proj")


@anatomy(f"{TIMM}.convnext.ConvNeXt")
def convolutional(model: nn.Module) -> list[Site]:
    """ConvNeXt: stages of blocks on maps `[B, C, H, W]`."""
    builder = _Builder(model, "image")
    _stages(builder, model.stages, "stages", refuse=NO_TOKENS)  # type: ignore[arg-type]
    return builder.ends(embed="stem.0")


def _stages(builder: _Builder, stages: nn.Module, name: str, refuse: str) -> None:
    depth = 0
    for i, stage in enumerate(stages):  # type: ignore[arg-type]
        for j, block in enumerate(stage.blocks):
            path = f"{name}.{i}.blocks.{j}"
            builder.residual(path, block, depth)
            builder.add(path, "tokens", depth, refuse=refuse)
            depth += 1
    builder.add(name, "stack")


class _Builder(Builder):
    """Knows the blocks of timm's families."""

    def linear(self, path: str, role: str, depth: int = -1, **known: object) -> None:
        if any(cls.__name__.startswith(("StdConv", "ScaledStdConv")) for cls in type(self.module(path)).__mro__):
            known["refuse"] = STANDARDISED
        super().linear(path, role, depth, **known)

    def residual(self, path: str, block: nn.Module, depth: int) -> None:
        """One residual block of any family: its own site, its sub-layers and their projections."""
        convolution = hasattr(block, "conv_dw")
        self.block(path, depth, _width(block), channel_dim=1 if convolution else -1)
        if convolution:
            self.linear(f"{path}.conv_dw", "conv", depth)
            self.mlp(f"{path}.mlp", block.mlp, depth)
        elif hasattr(block, "attns"):
            for j, branch in enumerate(block.attns):  # type: ignore[arg-type]
                self.attention(f"{path}.attns.{j}.attn", branch.attn, depth, **_things(f"{path}.attns.{j}"))
            for j, branch in enumerate(block.ffns):  # type: ignore[arg-type]
                self.mlp(f"{path}.ffns.{j}.mlp", branch.mlp, depth, **_things(f"{path}.ffns.{j}"))
        elif hasattr(block, "in_proj"):
            self.scaled(path, block, depth)
        else:
            # along the hierarchy: in a tuned model the block's own class stands behind a subclass
            post = any(cls.__name__ in POST_NORM for cls in type(block).__mro__)
            # SwinV2's attention reads windows of the stream; no module of the block sees the stream itself.
            stream = f"{path}.attn" if not hasattr(block, "window_size") else ""
            stream = stream if post else f"{path}.norm1"
            self.attention(f"{path}.attn", block.attn, depth, stream=stream, out=f"{path}.drop_path1")
            stream = f"{path}.mlp" if post else f"{path}.norm2"
            self.mlp(f"{path}.mlp", block.mlp, depth, stream=stream, out=f"{path}.drop_path2")

    def attention(self, path: str, attention: nn.Module, depth: int, stream: str = "", out: str = "") -> None:
        fused = getattr(attention, "qkv", None)
        if fused is not None:
            size = weight_shape(fused)[0] // 3
            # With a bias of its own the attention adds it around (or in place behind) the projection.
            reads = getattr(attention, "q_bias", None) is not None
            for i, name in enumerate("qkv"):
                apart = {"via": "weight", "bias": f"{path}.{name}_bias"} if reads else {}
                self.linear(f"{path}.qkv", f"attn.{name}", depth, rows=(i * size, (i + 1) * size), **apart)
        else:
            for name in "qkv":
                module = f"{name}_proj" if hasattr(attention, f"{name}_proj") else name
                self.linear(f"{path}.{module}", f"attn.{name}", depth)
        self.linear(f"{path}.proj", "attn.out", depth)
        width = weight_shape(attention.proj)[0]
        self.add(path, "attn", depth, width=width, stream=stream, out=out)
        self.keys_and_values(path, attention, depth)

    def keys_and_values(self, path: str, attention: nn.Module, depth: int) -> None:
        """The `kv` site; keys and values have a head for every head of the queries by the time they meet."""
        heads = int(attention.num_heads)  # type: ignore[arg-type]
        out = next(m for n in ("proj", "attn_out_proj", "out_proj") if (m := getattr(attention, n, None)) is not None)
        inner = int(attention.in_split[-1] if hasattr(attention, "in_split") else weight_shape(out)[1])  # type: ignore
        # SwinV2's scores are cosines; differential attention keeps its λ
        view = cosine if hasattr(attention, "logit_scale") else attend
        refuse = DIFFERENCE if hasattr(attention, "dual_lambda") else ""
        known = {"width": inner // heads, "heads": heads, "refuse": refuse}
        self.add(path, "kv", depth, connect=Connect("", view), **known)

    def mlp(self, path: str, mlp: nn.Module, depth: int, stream: str = "", out: str = "") -> None:
        if hasattr(mlp, "fc1_g"):
            self.linear(f"{path}.fc1_x", "mlp.up", depth)
            self.linear(f"{path}.fc1_g", "mlp.gate", depth)
        elif hasattr(mlp, "gate_last"):
            half = weight_shape(mlp.fc1)[0] // 2
            first, second = (0, half), (half, 2 * half)
            up, gate = (first, second) if mlp.gate_last else (second, first)
            self.linear(f"{path}.fc1", "mlp.up", depth, rows=up)
            self.linear(f"{path}.fc1", "mlp.gate", depth, rows=gate)
        else:
            self.linear(f"{path}.fc1", "mlp.up", depth)
        self.linear(f"{path}.fc2", "mlp.down", depth)
        channel = 1 if isinstance(mlp.fc2, nn.Conv2d) else -1
        width = weight_shape(mlp.fc2)[0]
        self.add(path, "mlp", depth, width=width, channel_dim=channel, stream=stream, out=out)

    def scaled(self, path: str, block: nn.Module, depth: int) -> None:
        """ParallelScalingBlock: one projection into the feed-forward network and attention at once."""
        start = 0
        for role, size in zip(("mlp.up", "attn.q", "attn.k", "attn.v"), block.in_split):  # type: ignore[arg-type]
            apart = {"bias": f"{path}.mlp_bias"} if role == "mlp.up" and block.mlp_bias is not None else {}
            self.linear(f"{path}.in_proj", role, depth, rows=(start, start + size), **apart)
            start += size
        for name, role in (("out_proj", "attn.out"), ("attn_out_proj", "attn.out"), ("mlp_out_proj", "mlp.down")):
            if getattr(block, name, None) is not None:
                self.linear(f"{path}.{name}", role, depth)
        self.keys_and_values(path, block, depth)

    def ends(self, embed: str) -> list[Site]:
        """All sites; the classifier is the head, DeiT's distilled models have two."""
        classifier = getattr(self.model, "get_classifier", lambda: None)()
        heads = classifier if isinstance(classifier, tuple) else (classifier,)
        return self.finish({embed}, {path for path, module in self.modules() if any(module is own for own in heads)})


def _things(path: str) -> dict[str, str]:
    return {"stream": f"{path}.norm", "out": f"{path}.drop_path"}


def _width(block: nn.Module) -> int:
    """Channels of the residual stream through a block."""
    if hasattr(block, "conv_dw"):
        return weight_shape(block.conv_dw)[0]
    if hasattr(block, "in_proj"):
        return weight_shape(block.in_proj)[1]
    attention = block.attns[0].attn if hasattr(block, "attns") else block.attn  # type: ignore[index, union-attr]
    return weight_shape(attention.proj)[0]

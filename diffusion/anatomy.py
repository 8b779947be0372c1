"""Where diffusers' models can be tuned: UNets (SD 1 and 2, SDXL, unconditional), DiT, PixArt, SD3, Flux.

Registered by class name, so that importing this file imports no diffusers. A model is read by the classes of its
parts (attention, feed-forward network, block), so that most configurations need no line of their own. What is
said here of a module is checked by running the models in `tests/unit/test_anatomy_diffusers.py`.

Depth counts residual blocks in the order in which they run: in a UNet down, middle, up, where every ResNet block
and every transformer block is one; samplers and the projections around transformer blocks are outside.

Sub-layers under adaptive norms (DiT, PixArt, SD3, Flux) are gated by the time step on their way to the residual
sum. The gate is no module: what an adapter adds behind such a sub-layer passes it as well.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mmpeft.parts.attention import attend
from mmpeft.sites import Connect, Site, anatomy
from mmpeft.sites.builder import Builder, is_a, is_projection

PRESETS = {
    "content": "path=up_blocks.0.attentions.0.*",
    "style": "path=up_blocks.0.attentions.1.*",
}
"""B-LoRA's two halves of SDXL (https://arxiv.org/abs/2403.14572): `at="attn.* & " + PRESETS["style"]`."""

MAPS = "the blocks work on maps; there is no token sequence to put prompts into"
PAIR = "the block takes and returns two streams, image and context; a single tensor does not hold its tokens"
DEAD = "its output is discarded: after the last block nothing reads the context stream"
FUSED = "its projections are fused into another one; call the model's unfuse_qkv_projections() before attaching"
PROCESSOR = (
    "its attention processor {} is not known to make one call of scaled_dot_product_attention; "
    "set AttnProcessor2_0 (or the model's own default) before attaching"
)

RESNETS = ("ResnetBlock2D", "ResnetBlockCondNorm2D")
ATTENTIONS = ("Attention", "FluxAttention")
PROCESSORS = (
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "AttnAddedKVProcessor2_0",
    "JointAttnProcessor2_0",
    "FusedJointAttnProcessor2_0",
    "FluxAttnProcessor",
)
"""Processors that make one call of `scaled_dot_product_attention`."""
JOINT = ("JointTransformerBlock", "FluxTransformerBlock")
STAGES = ("down_blocks", "mid_block", "up_blocks")
STACKS = (*STAGES, "transformer_blocks", "single_transformer_blocks")
TIME = {
    "time_embedding",
    "time_emb_proj",
    "add_embedding",
    "class_embedding",
    "adaln_single",
    "time_text_embed",
    "timestep_embedder",
    "proj_out_1",
}
"""Modules of the conditioning on time, size, class and pooled text. DiT's `proj_out_1` scales and shifts the
last norm by the time step; the head is `proj_out_2`."""
EMBEDDINGS = {"conv_in", "pos_embed.proj", "x_embedder", "context_embedder", "latent_image_embedding.emb"}
HEADS = {"conv_out", "proj_out", "proj_out_2", "out"}


@anatomy(
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
    "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel",
    "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel",
    "diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel",
    "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel",
    "diffusers.models.transformers.transformer_2d.Transformer2DModel",
)
def denoiser(model: nn.Module) -> list[Site]:
    """A UNet (tower `unet`) or a transformer on patches (tower `dit`)."""
    builder = _Builder(model, "unet" if _child(model, "down_blocks") is not None else "dit")
    found = [path for path, module in builder.modules() if _is_block(module)]
    for depth, path in enumerate(sorted(found, key=_execution)):
        builder.residual(path, builder.module(path), depth)
    if not any(site.role == "tokens" for site in builder.sites):
        for path, (depth, _) in builder.blocks.items():
            builder.add(path, "tokens", depth, refuse=MAPS)
    for name in STACKS:
        if _child(model, name) is not None:
            builder.add(name, "stack")
    builder.projections()
    return builder.finish(embed=EMBEDDINGS, heads=HEADS)


@dataclass
class _Builder(Builder):
    dead: dict[str, str] = field(default_factory=dict)
    """Modules whose output nothing reads, and why.

    They keep no ordinary role: a method at `attn.{q,v}|cross.{q,v}` or `norm` shall tune all that there is to tune,
    and not fail for the one module that the architecture leaves behind. They are found, refused, under `proj`.
    """

    def finish(self, embed: Collection[str] = (), heads: Collection[str] = ()) -> list[Site]:
        sites = super().finish(embed, heads)
        return [
            replace(s, role="proj", dead=True, refuse=self.dead[s.path]) if s.path in self.dead else s for s in sites
        ]

    def depth_of(self, path: str) -> int:
        """Depth of the block around a module, -1 outside."""
        while path and path not in self.blocks:
            path = path.rpartition(".")[0]
        return self.blocks[path][0] if path else -1

    # -- blocks and their sub-layers ------------------------------------------------------------------------

    def residual(self, path: str, block: Any, depth: int) -> None:
        """One residual block of any family: its own site, its sub-layers, the tokens it sees."""
        if is_a(block, *RESNETS):
            self.block(path, depth, int(block.conv2.out_channels), channel_dim=1, inputs=int(block.conv1.in_channels))
        elif is_a(block, "BasicTransformerBlock"):
            self.basic(path, block, depth)
        elif is_a(block, *JOINT):
            self.joint(path, block, depth)
        elif is_a(block, "FluxSingleTransformerBlock"):
            self.single(path, block, depth)
        else:
            # Attention on a map that adds its input itself: inside it works on tokens, between its projections.
            width = int(block.query_dim)
            self.block(path, depth, width, channel_dim=1)
            self.add(f"{path}.to_out.0", _role(block), depth, width=width, entry=f"{path}.to_q")

    def basic(self, path: str, block: Any, depth: int) -> None:
        """Self-attention, cross-attention where there is one, feed-forward network."""
        width = int(block.attn1.query_dim)
        self.block(path, depth, width)
        self.add(path, "tokens", depth, width=width)
        # PixArt norms no cross-attention: it reads the stream itself, and its second norm is the feed-forward's.
        pixart = block.norm_type == "ada_norm_single"
        self.add(f"{path}.attn1", _role(block.attn1), depth, width=width, stream=f"{path}.norm1")
        if block.attn2 is not None:
            stream = f"{path}.attn2" if pixart else f"{path}.norm2"
            self.add(f"{path}.attn2", _role(block.attn2), depth, width=width, stream=stream)
        self.add(f"{path}.ff", "mlp", depth, width=width, stream=f"{path}.norm2" if pixart else f"{path}.norm3")

    def joint(self, path: str, block: Any, depth: int) -> None:
        """SD3 and Flux: one attention over image and context, each with its projections and its network.

        The context's own are `cross`. The attention returns a pair, image first: behind the module stands the
        image, behind `to_add_out` the context.
        """
        attention = block.attn
        width = int(attention.out_dim)
        self.block(path, depth, width, refuse=PAIR)
        self.add(path, "tokens", depth, width=width, refuse=PAIR)
        self.add(f"{path}.attn", "attn", depth, width=width, stream=f"{path}.norm1")
        if _child(block, "attn2") is not None:  # SD3.5: a second attention, of the image alone, beside the first
            self.add(f"{path}.attn2", "attn", depth, width=width, stream=f"{path}.norm1")
        if _child(attention, "to_add_out") is not None:
            known = {"entry": f"{path}.attn.add_q_proj", "stream": f"{path}.norm1_context"}
            self.add(f"{path}.attn.to_add_out", "cross", depth, width=width, **known)
        else:  # SD3's last block: the context is looked at and looks at nothing
            self.dead |= {f"{path}.attn.{name}": DEAD for name in ("add_q_proj", "norm_added_q")}
        self.add(f"{path}.ff", "mlp", depth, width=width, stream=f"{path}.norm2")
        if _child(block, "ff_context") is not None:
            self.add(f"{path}.ff_context", "mlp", depth, width=width, stream=f"{path}.norm2_context")

    def single(self, path: str, block: Any, depth: int) -> None:
        """Flux on one stream: attention and feed-forward network side by side, joined in `proj_out`.

        The two are one sub-layer here, named by its feed-forward network. `proj_out` reads the output of attention
        and the inner activation of the network next to each other: it is neither `attn.out` nor `mlp.down`
        (whose input (IA)³ rescales, say), so it is `proj`.
        """
        width = int(block.proj_out.out_features)
        self.block(path, depth, width, refuse=PAIR)
        self.add(path, "tokens", depth, width=width, refuse=PAIR)
        self.linear(f"{path}.proj_mlp", "mlp.up", depth)
        self.linear(f"{path}.proj_out", "proj", depth)
        known = {"entry": f"{path}.proj_mlp", "stream": f"{path}.norm"}
        self.add(f"{path}.proj_out", "mlp", depth, width=width, **known)

    # -- projections ----------------------------------------------------------------------------------------

    def projections(self) -> None:
        """The linears and convolutions that have a role of their own."""
        for path, module in list(self.modules()):
            depth, names = self.depth_of(path), path.split(".")
            if "fuser" in names:  # GLIGEN's boxes: these layers rest unless boxes are given
                continue
            if is_a(module, *ATTENTIONS):
                self.attention(path, module, depth)
            elif is_a(module, "FeedForward"):
                self.feed_forward(path, module, depth)
            elif isinstance(module, nn.Embedding) and path not in EMBEDDINGS:  # of classes or time steps
                self.add(path, "time", depth, kind="embedding", transposed=True, width=module.embedding_dim)
            elif is_projection(module):
                adaptive = names[-1] == "linear" and names[-2].startswith("norm")
                if adaptive or TIME & set(names):
                    self.linear(path, "time", depth)
                elif isinstance(module, nn.Conv2d) and names[0] in STAGES and names[-1] not in ("proj_in", "proj_out"):
                    self.linear(path, "conv", depth)

    def attention(self, path: str, attention: nn.Module, depth: int) -> None:
        own, refuse = _role(attention), FUSED if _is_fused(attention) else ""
        for name in "qkv":
            if _child(attention, f"to_{name}") is not None:
                self.linear(f"{path}.to_{name}", f"{own}.{name}", depth, refuse=refuse)
            if _child(attention, f"add_{name}_proj") is not None:
                self.linear(f"{path}.add_{name}_proj", f"cross.{name}", depth, refuse=refuse)
        if _child(attention, "to_out") is not None:
            self.linear(f"{path}.to_out.0", f"{own}.out", depth)
        if _child(attention, "to_add_out") is not None:
            self.linear(f"{path}.to_add_out", "cross.out", depth)
        self.keys_and_values(path, attention, depth)

    def keys_and_values(self, path: str, attention: Any, depth: int) -> None:
        """The `kv` site: of a joint attention one for both streams, of added keys and values one for all."""
        heads = int(attention.heads)
        processor = type(attention.processor).__name__
        refuse = "" if processor in PROCESSORS else PROCESSOR.format(processor)
        known = {"width": int(attention.inner_dim) // heads, "heads": heads, "refuse": refuse}
        self.add(path, "kv", depth, connect=Connect("", attend), **known)

    def feed_forward(self, path: str, network: Any, depth: int) -> None:
        """A gated network projects to both halves at once; the activation is applied to the second."""
        first = f"{path}.net.0.proj"
        if is_a(network.net[0], "GEGLU", "SwiGLU"):
            half = int(network.net[0].proj.out_features) // 2
            self.fused(first, ("mlp.up", "mlp.gate"), (half, half), depth)
        else:
            self.linear(first, "mlp.up", depth)
        self.linear(f"{path}.net.2", "mlp.down", depth)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)


def _is_block(module: nn.Module) -> bool:
    """Whether a module adds to what it is given and returns the sum."""
    if is_a(module, "Attention"):  # attention on a map; DeepFloyd IF's says so by its processor alone
        return bool(module.residual_connection) or "AddedKV" in type(module.processor).__name__
    return is_a(module, *RESNETS, *JOINT, "BasicTransformerBlock", "FluxSingleTransformerBlock")


def _role(attention: nn.Module) -> str:
    """`cross` for queries that look at a context alone.

    Attention with added keys and values (DeepFloyd IF) looks at both: only what is added belongs to the context.
    """
    if getattr(attention, "only_cross_attention", False):
        return "cross"
    added = getattr(attention, "added_kv_proj_dim", None) is not None
    return "cross" if getattr(attention, "is_cross_attention", False) and not added else "attn"


def _is_fused(attention: nn.Module) -> bool:
    """Whether attention runs on fused projections; UNets keep the flag after unfusing and change the processor."""
    fused = bool(getattr(attention, "fused_projections", False))
    return fused and (is_a(attention, "FluxAttention") or "Fused" in type(attention.processor).__name__)


def _execution(path: str) -> tuple[int, ...]:
    """Sorts blocks by the order in which they run; diffusers registers `up_blocks` before `mid_block`.

    In a stage ResNet blocks and attentions take turns, ResNet blocks first, and samplers come last.
    """
    names = path.split(".")
    if names[0] not in STAGES:
        return (STACKS.index(names[0]),)
    middle = names[0] == "mid_block"
    inner = names[1:] if middle else names[2:]
    stage = (STAGES.index(names[0]), 0 if middle else int(names[1]))
    if inner[0] in ("resnets", "attentions"):
        return (*stage, 0, int(inner[1]), int(inner[0] == "attentions"))
    return (*stage, 1)

"""The names that the original repository of Stable Diffusion gives to the modules of its UNet, as trainers of SDXL do.

    input_blocks.4.1.transformer_blocks.0.attn1.to_q      down_blocks.1.attentions.0.… of diffusers

The blocks of a model are counted: first the convolution of the input, then in each down block its layers (ResNet `.0`,
attention `.1`) and its downsampler; on the way up each layer, the upsampler behind what the block's last one has.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def names_of(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Original name → name of a module, for all the named modules of a UNet2DConditionModel."""
    found = {theirs: ours for theirs, ours in _ENDS.items() if ours in modules}
    for theirs, ours in _blocks(modules):
        inner = [name.removeprefix(f"{ours}.") for name in modules if name.startswith(f"{ours}.")]
        back = {own: name for name, own in _RESNET.items()} if ".resnets." in ours else {}
        found |= {f"{theirs}.{back.get(name, name)}": f"{ours}.{name}" for name in inner}
        found |= {theirs: ours} if ours in modules and not inner else {}
    return found


def _blocks(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Prefixes that belong together; a sampler's one convolution is under its own name."""
    place = 1
    for block in _count(modules, "down_blocks"):
        for layer in _count(modules, f"{block}.resnets"):
            yield f"input_blocks.{place}.0", layer
            yield f"input_blocks.{place}.1", layer.replace("resnets", "attentions")
            place += 1
        if f"{block}.downsamplers.0.conv" in modules:
            yield f"input_blocks.{place}.0.op", f"{block}.downsamplers.0.conv"
            place += 1
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{i}", f"mid_block.{name}"
    place = 0
    for block in _count(modules, "up_blocks"):
        attended = f"{block}.attentions" in modules
        for layer in _count(modules, f"{block}.resnets"):
            yield f"output_blocks.{place}.0", layer
            yield f"output_blocks.{place}.1", layer.replace("resnets", "attentions")
            place += 1
        if f"{block}.upsamplers.0.conv" in modules:
            yield f"output_blocks.{place - 1}.{2 if attended else 1}.conv", f"{block}.upsamplers.0.conv"


def _count(modules: dict[str, nn.Module], path: str) -> Iterator[str]:
    i = 0
    while f"{path}.{i}" in modules:
        yield f"{path}.{i}"
        i += 1

"""The UNets of Stable Diffusion by the names of their own repository, as ComfyUI's and others' tables have them."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.readers.job import Job

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def sdxl_name(job: Job) -> Callable[[str], str]:
    """diffusers' name of a tensor → the repository's, for two layers a block as SD and SDXL have them."""
    attended = [name.startswith("CrossAttn") for name in job.configs["unet"]["up_block_types"]]

    def name(key: str) -> str:
        path, _, end = key.rpartition(".")
        if path in ENDS:
            return f"{ENDS[path]}.{end}"
        steps = path.split(".")
        if steps[0] == "mid_block":
            block = 1 if steps[1] == "attentions" else 2 * int(steps[2])
            start, rest, resnet = f"middle_block.{block}", steps[3:], steps[1] == "resnets"
        else:
            block, kind, index = int(steps[1]), steps[2], int(steps[3])
            resnet, rest = kind == "resnets", steps[4:]
            if kind == "downsamplers":
                return f"input_blocks.{3 * block + 3}.0.op.{end}"
            if kind == "upsamplers":
                return f"output_blocks.{3 * block + 2}.{2 if attended[block] else 1}.conv.{end}"
            place = int(kind == "attentions")
            down = steps[0] == "down_blocks"
            start = (
                f"input_blocks.{3 * block + index + 1}.{place}"
                if down
                else f"output_blocks.{3 * block + index}.{place}"
            )
        inner = ".".join(rest)
        return f"{start}.{RESNET.get(inner, inner) if resnet else inner}.{end}"

    return name

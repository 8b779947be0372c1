"""Flux and SD3 by the names of their own repositories, as diffusers' converters of whole checkpoints have them."""

from __future__ import annotations

from benchmarks.readers.job import Job, Tensors

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def table(job: Job) -> dict[str, tuple[str, ...]]:
    """Own name → diffusers' names of its parts, of the blocks alone."""
    config = job.configs["transformer"]
    found: dict[str, tuple[str, ...]] = {}
    if job.kind not in ("SD3", "Flux"):
        raise ValueError(f"the names of {job.kind} in its own repository are not known here")
    if job.kind == "SD3":
        for i in range(config["num_layers"]):
            ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            for own, names, out, mlp, mod in (
                ("x_block", QKV, "attn.to_out.0", "ff", "norm1"),
                ("context_block", ADDED, "attn.to_add_out", "ff_context", "norm1_context"),
            ):
                found[f"{theirs}.{own}.attn.qkv"] = tuple(f"{ours}.attn.{name}" for name in names)
                found[f"{theirs}.{own}.attn.proj"] = (f"{ours}.{out}",)
                found[f"{theirs}.{own}.mlp.fc1"] = (f"{ours}.{mlp}.net.0.proj",)
                found[f"{theirs}.{own}.mlp.fc2"] = (f"{ours}.{mlp}.net.2",)
                found[f"{theirs}.{own}.adaLN_modulation.1"] = (f"{ours}.{mod}.linear",)
        return found
    for i in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for own, names, out, mlp, mod in (
            ("img", QKV, "attn.to_out.0", "ff", "norm1"),
            ("txt", ADDED, "attn.to_add_out", "ff_context", "norm1_context"),
        ):
            found[f"{theirs}.{own}_attn.qkv"] = tuple(f"{ours}.attn.{name}" for name in names)
            found[f"{theirs}.{own}_attn.proj"] = (f"{ours}.{out}",)
            found[f"{theirs}.{own}_mlp.0"] = (f"{ours}.{mlp}.net.0.proj",)
            found[f"{theirs}.{own}_mlp.2"] = (f"{ours}.{mlp}.net.2",)
            found[f"{theirs}.{own}_mod.lin"] = (f"{ours}.{mod}.linear",)
    for i in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        found[f"{theirs}.linear1"] = (*(f"{ours}.attn.{name}" for name in QKV), f"{ours}.proj_mlp")
        found[f"{theirs}.linear2"] = (f"{ours}.proj_out",)
        found[f"{theirs}.modulation.lin"] = (f"{ours}.norm.linear",)
    ends = {
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
    }
    return found | {name: (path,) for name, path in ends.items()}


def native(job: Job, base: Tensors) -> Tensors:
    """The transformer's tensors by its own names."""
    import torch

    found: Tensors = {}
    for name, paths in table(job).items():
        for end in ("weight", "bias"):
            own = [base.get(f"transformer.{path}.{end}") for path in paths]
            if all(tensor is not None for tensor in own):
                found[f"{name}.{end}"] = torch.cat(own)
    return found


def back(job: Job, base: Tensors, new: Tensors) -> Tensors:
    """Tensors by diffusers' names again."""
    found: Tensors = {}
    for name, paths in table(job).items():
        for end in ("weight", "bias"):
            if f"{name}.{end}" in new:
                sizes = [len(base[f"transformer.{path}.{end}"]) for path in paths]
                pieces = new[f"{name}.{end}"].split(sizes)
                found |= {f"transformer.{path}.{end}": piece for path, piece in zip(paths, pieces)}
    return found

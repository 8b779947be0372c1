"""lycoris-lora: its own factory of modules from a file, merged into trees of the model's modules."""

from __future__ import annotations

from benchmarks.readers.job import Job, Tensors, answer
from benchmarks.readers.models import all_back, denoiser_tree, own, parts, text_tree
from benchmarks.readers.unet_names import sdxl_name


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    import torch
    from lycoris.kohya import create_network_from_weights

    unet, back = denoiser_tree(job, base, sdxl_name(job) if job.kind == "SDXL" else None)
    texts = {part: text_tree(own(base, part)) for part in parts(base) if part.startswith("text")}
    given = list(texts.values()) if len(texts) > 1 else next(iter(texts.values()), None)
    with torch.no_grad():
        network, _ = create_network_from_weights(1.0, None, None, given, unet, weights_sd=file)
        for module in network.unet_loras + network.text_encoder_loras:
            module.merge_to(1.0)
    return all_back(back, texts, base)


if __name__ == "__main__":
    answer(read)

"""lycoris-lora: its own factory of modules from a file, merged into trees of the model's modules."""

from __future__ import annotations

from benchmarks.readers.job import Job, Tensors, answer
from benchmarks.readers.models import denoiser_tree, is_t5, own, parts, text_back, text_tree


def read(job: Job, base: Tensors, file: Tensors) -> Tensors:
    import torch
    from lycoris.kohya import create_network_from_weights

    unet, back = denoiser_tree(job, base)
    texts = {part: text_tree(own(base, part)) for part in parts(base) if part.startswith("text")}
    if any(is_t5(own(base, part)) for part in texts):
        texts = {part: text for part, text in texts.items() if not is_t5(own(base, part))}
    given = list(texts.values()) if len(parts(base)) > 2 else next(iter(texts.values()), None)
    with torch.no_grad():
        network, _ = create_network_from_weights(1.0, None, None, given, unet, weights_sd=file)
        for module in network.unet_loras + network.text_encoder_loras:
            module.merge_to(1.0)
    found = back()
    for part, text in texts.items():
        found |= text_back(part, text, base)
    return found


if __name__ == "__main__":
    answer(read)

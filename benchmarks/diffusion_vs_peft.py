"""A training step of diffusion LoRA beside the diffusers + peft loop and beside the floor, on one core.

    python benchmarks/diffusion_vs_peft.py [--rounds 5] [--batch 2]

Backbone: a UNet2DConditionModel of SD 1.5's layout at a quarter of its widths (latents 32×32, text of 77×192), random
weights; LoRA and DoRA of rank 4 on q, k, v, out of self- and cross-attention, as diffusers' train_text_to_image_lora
sets it. A step is all that its loop does: noise, forward, mean squared error, backward, clipped gradients, AdamW. The
*floor* trains `conv_in.bias` alone: a full forward and a full input-gradient backward pass. Models run in turn; medians
count. Bytes saved for backward are counted, parameters excluded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from timing import interleaved
from torch import Tensor, nn

import mmpeft
from mmpeft.bench.memory import kept_for_backward
from mmpeft.diffusion.objective import Denoising

AT = "attn.{q,k,v,out}|cross.{q,k,v,out}"
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32, block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, attention_head_dim=8,
        norm_num_groups=16,
    )  # fmt: skip


def floor() -> nn.Module:
    model = backbone().requires_grad_(False)
    model.conv_in.bias.requires_grad_(True)
    return model


def ours(method: mmpeft.Method, recompute: str | None = None) -> nn.Module:
    model = backbone()
    mmpeft.attach(model, method).recompute = recompute
    return model


def peers(dora: bool) -> nn.Module:
    from peft import LoraConfig

    model = backbone().requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS, use_dora=dora)
    model.add_adapter(config)
    return model


def loop(model: nn.Module, batch: int) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """One whole training step, and its loss alone."""
    latents, text = torch.randn(batch, 4, 32, 32), torch.randn(batch, 77, 192)
    objective = Denoising(DDPMScheduler())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def loss() -> Tensor:
        noise, steps = torch.randn_like(latents), objective.draw(batch)
        return F.mse_loss(model(objective.noisy(latents, noise, steps), steps, text).sample, noise)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lora, dora = (kind(rank=4, alpha=4, at=AT) for kind in (mmpeft.LoRA, mmpeft.DoRA))
    models = {
        "floor": floor(),
        "ours LoRA": ours(lora),
        "peers LoRA": peers(dora=False),
        "ours DoRA": ours(dora),
        "peers DoRA": peers(dora=True),
        "ours LoRA, recompute pointwise": ours(lora, "pointwise"),
        "ours LoRA, recompute block": ours(lora, "block"),
    }
    counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    assert counts["ours LoRA"] == counts["peers LoRA"], counts
    loops = {name: loop(model, args.batch) for name, model in models.items()}
    kept = {name: kept_for_backward(loss) for name, (_, loss) in loops.items()}
    seconds = interleaved({name: step for name, (step, _) in loops.items()}, args.rounds)
    size = sum(p.numel() for p in backbone().parameters()) / 1e6
    print(f"UNet of {size:.0f} M, batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}")
    print(f"{'':32}{'trains':>9}{'s/step':>8}{'÷floor':>8}{'÷peers':>8}{'MiB':>8}{'÷floor':>8}{'÷peers':>8}")
    for name in models:
        peer = "peers DoRA" if "DoRA" in name else "peers LoRA"
        print(
            f"{name:32}{counts[name]:9,}{seconds[name]:8.3f}{seconds[name] / seconds['floor']:8.3f}"
            f"{seconds[name] / seconds[peer]:8.3f}{kept[name] / 2**20:8.0f}{kept[name] / kept['floor']:8.2f}"
            f"{kept[name] / kept[peer]:8.2f}"
        )


if __name__ == "__main__":
    main()

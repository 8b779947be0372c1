"""How well the embedded pipelines draw what they are asked for: names of identities that nothing was trained on.

    python benchmarks/embedded_pipelines.py

Draws the 382 test names, has the local evaluators say which category and which style each drawing is of, and writes
the numbers into the pipeline's card and a sample grid to docs/embedded/. The ceiling is what the evaluators make of
drawings by hand of the same identities.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.progress import track

from mmpeft.diffusion.backbone import INDEX, create
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.family import Family
from mmpeft.diffusion.pretrain import CARD, PROMPTS, STYLES
from mmpeft.diffusion.style.emoji_judge import EmojiJudge
from mmpeft.diffusion.style.grid import labelled_grid
from mmpeft.embedded import emoji
from mmpeft.embedded.captions import captions
from mmpeft.embedded.emoji import STYLES as KNOWN
from mmpeft.embedded.store import WEIGHTS
from mmpeft.files import write_atomic

STEPS, GUIDANCE, BATCH, SAMPLES = 20, 3.0, 64, 4
DOCS = Path(__file__).parent.parent / "docs" / "embedded"


def main() -> None:
    """Measure every embedded pipeline."""
    for folder in sorted(path.parent for path in WEIGHTS.glob(f"*/{INDEX}")):
        family = family_of(create(f"embedded:{folder.name}"))
        facts = measured(family, folder.name)
        card = json.loads((folder / CARD).read_text("utf-8")) | {"drawn": facts}
        write_atomic(folder / CARD, (json.dumps(card, indent=2) + "\n").encode())
        write_atomic(DOCS / f"{folder.name}.png", grid(family))
        print(folder.name, json.dumps(facts, indent=1))


@torch.no_grad()
def measured(family: Family, name: str) -> dict[str, float]:
    """Shares of drawings of the category that was asked for, by pipeline and by hand, and of each style."""
    judge, labels = EmojiJudge(family.size, "noto"), emoji("noto", "test").labels
    prompts = [said[0] for said in captions(emoji("noto", "test"))]
    images = []
    for start in track(range(0, len(prompts), BATCH), name):
        part = prompts[start : start + BATCH]
        images.append(draw(family, part, start))
    styles, found = judge(torch.cat(images))
    facts = {"prompts": float(len(prompts)), "category": float((found == labels).float().mean())}
    facts |= {f"style {KNOWN[i]}": float((styles == i).float().mean()) for i in range(len(KNOWN))}
    for style in STYLES:
        real = emoji(style, "test", family.size)
        facts[f"category, {style} by hand"] = judge.accuracy(real.rgb().float() / 255, [], real.labels)["caption"]
    return {key: round(value, 4) for key, value in facts.items()}


@torch.no_grad()
def grid(family: Family) -> bytes:
    """Prompts down, samples across."""
    return labelled_grid({f"{n}": draw(family, PROMPTS, 10_000 * (n + 1)) for n in range(SAMPLES)}, PROMPTS)


def draw(family: Family, prompts: list[str] | tuple[str, ...], seed: int) -> torch.Tensor:
    """One drawing a prompt, prompt i from noise `seed + i`."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return family.draw(prompts, noise, STEPS, GUIDANCE, family.size)


if __name__ == "__main__":
    main()

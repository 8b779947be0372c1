"""One tuning, weaker or stronger, without merging it."""

from __future__ import annotations

from mmpeft.surgery.choice import use
from mmpeft.surgery.together import Together
from mmpeft.tuning import Tuning


def strength(tuning: Tuning, share: float) -> use:
    """Run a tuning at `y₀ + α (y₁ − y₀)` at each of its parts: at once, or for the length of a `with` block.

    y₀ is what a part finds and y₁ what it makes of it; a change of weights is scaled itself, `W + α s ΔW`. 0 is the
    base and 1 the tuning, both bit for bit; values beyond go further the same way. Needs no merging, so adapters have a
    strength too; `interpolate` scales the merged weights instead.

    Args:
        tuning: attached, and not merged.
        share: α.

    Raises:
        Refused: a part is no change of what the base has, such as a prompt, and α is neither 0 nor 1.
    """
    model, name = tuning.model, tuning.name
    if share in (0, 1):
        return use(model, name if share else None)
    return use(model, Together((name,), (share,)))

"""What outputs stand for: kept in a checkpoint, and compared before it is used."""

from __future__ import annotations

from mmpeft.errors import DataError
from mmpeft.types import Facts


def check_meaning(checkpoint: Facts, meaning: Facts) -> None:
    """Raise DataError where the outputs of a checkpoint stand for something else than those of this run."""
    for name, own in meaning.items():
        trained = checkpoint.get(name, own)
        if own and trained != own:
            raise DataError(
                f"the checkpoint was trained on {_listed(name, trained)}, the data module has {_listed(name, own)}: "
                "the outputs would be misread"
            )


def _listed(name: str, values: object) -> str:
    if not isinstance(values, list):
        return f"{name} {values!r}"
    return f"{len(values)} {name} ({', '.join(map(str, values[:5]))}{' …' if len(values) > 5 else ''})"

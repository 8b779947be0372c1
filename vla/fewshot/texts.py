"""Class names as token numbers, with room for learned context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError, DataError
from mmpeft.parts.in_place import InPlace
from mmpeft.surgery.choice import use
from mmpeft.tuning import Tuning
from mmpeft.types import Output
from mmpeft.vla.backbone import Tokenizer, check_length, towers_of


class ClassTexts:
    """Tokens of class names, int64 [templates, C, n].

    Where a method learns tokens in place, each name has placeholders in front, and the learned tokens begin with the
    words of the first template there; what the template says behind the name stays.
    """

    def __init__(
        self, names: Sequence[str], templates: Sequence[str], tokens: Tokenizer, tuning: Tuning | None
    ) -> None:
        """`tuning` is what may learn tokens in place; None for the templates as they are."""
        for template in templates:
            if template.count("{}") != 1:
                raise ConfigError(f"a template holds the class name once, as in 'a photo of a {{}}.'; got {template!r}")
        placed = tuning.placements if tuning is not None else ()
        learned = [p.part for p in placed if isinstance(p.part, InPlace) and p.role == "embed"]
        before, _, after = templates[0].partition("{}")
        texts = [[t.replace("{}", name) for name in names] for t in (["{}" + after] if learned else templates)]
        for own in texts:
            check_length(own, tokens)
        self.tokens = torch.stack([tokens(own) for own in texts])
        for part in learned:
            start = self.tokens[0, :, : part.position]
            if not (start == start[:1]).all():
                raise ConfigError(
                    f"position={part.position} stands behind a start token, which this tokenizer does not write (as "
                    "SigLIP's): give the method position=0"
                )
            self.tokens = with_room(self.tokens, len(part.tokens), part.position)
            assert tuning is not None
            self.start(part, before, tokens, tuning)

    def start(self, part: InPlace, words: str, tokens: Tokenizer, tuning: Tuning) -> None:
        """Let learned context begin with the words before the class name, as many as it has tokens."""
        (place,) = [p for p in tuning.placements if p.part is part]
        if words.strip():
            row = tokens([words.strip()])[0]
            own = row[part.position : int((row != row[-1]).sum()) - 1][: len(part.tokens)]
            with torch.no_grad(), use(tuning.model, None):
                part.tokens[: len(own)] = tuning.model.get_submodule(place.home)(own.to(part.tokens.device))

    def encode(self, model: nn.Module, classes: slice = slice(None)) -> Tensor:
        """Unit text features [C, d]: the mean over templates of unit features."""
        tokens = self.tokens[:, classes].to(next(model.parameters()).device)
        found: Output = towers_of(model).encode_text(tokens.flatten(0, 1), normalize=True)
        return F.normalize(found.unflatten(0, tokens.shape[:2]).mean(0), dim=-1)


def with_room(tokens: Tensor, room: int, position: int) -> Tensor:
    """Tokens [..., n] with `room` placeholders inserted at `position`; the last ones, padding, fall off.

    A placeholder is the number of a word that stands there anyway: no mask takes it for padding or for an end.

    Raises:
        DataError: a text is too long for that.
    """
    n = tokens.shape[-1]
    if position + room >= n or not (tokens[..., n - room :] == tokens[..., -1:]).all():
        raise DataError(f"class names leave no room for {room} learned tokens in a context of {n}; learn fewer")
    filler = tokens[..., position : position + 1].expand(*tokens.shape[:-1], room)
    return torch.cat([tokens[..., :position], filler, tokens[..., position : n - room]], -1)

"""Images with prompts, each one checked before a run starts."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from dataclasses import dataclass

from PIL import Image
from rich.progress import track

from mmpeft.data.captioned import Captioned, listed
from mmpeft.data.pictures import decoded
from mmpeft.diffusion.data.buckets import Size
from mmpeft.errors import DataError

LOG = logging.getLogger(__name__)
WORTH_A_BAR = 200


@dataclass(frozen=True)
class Facts:
    """What is known of an image once it has been looked at."""

    digest: str  # SHA-256 of the file's content
    size: Size  # upright


class Album:
    """Images in RGB with their prompts, all of them decoded once to see that they can be."""

    def __init__(self, found: Captioned, background: str | None = None) -> None:
        """
        Args:
            found: images with texts.
            background: the colour behind transparent pixels; None to refuse images that have some.

        Raises:
            DataError: images cannot be used, the first ones named with the reason; or one is there twice with one text.
        """
        self.found, self.background = found, background
        self._distinct()
        self.facts = self._look()
        twins = [found.where(row) for row in self._twins()]
        if twins:
            LOG.warning("images with the content of another one, so that it counts more than once: %s", listed(twins))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.found)

    @property
    def prompts(self) -> list[str]:
        """The prompt of every sample."""
        return self.found.texts

    def image(self, index: int) -> Image.Image:
        """An image in RGB, upright."""
        return decoded(self.found.data(index), self.found.where(index), self.background, exact=True)

    def _distinct(self) -> None:
        seen: set[tuple[int, str]] = set()
        for index, entry in enumerate(zip(self.found.rows, self.found.texts)):
            if entry in seen:
                where = self.found.where(index)
                raise DataError(f"{where} is there twice with one text; remove one of them (`repeats` is for all)")
            seen.add(entry)

    def _look(self) -> list[Facts]:
        known: dict[int, Facts] = {}
        wrong: list[DataError] = []
        first = {row: index for index, row in reversed(list(enumerate(self.found.rows)))}
        quiet = len(first) < WORTH_A_BAR
        for row, index in track(sorted(first.items()), "Checking images", disable=quiet, transient=True):
            where = self.found.where(index)
            try:
                data = self.found.data(index)
                width, height = decoded(data, where, self.background, exact=True).size
                known[row] = Facts(hashlib.sha256(data).hexdigest(), (height, width))
            except DataError as error:
                wrong.append(error)
        if len(wrong) > 1:
            raise DataError(f"{len(wrong)} of {len(first)} images cannot be used: {listed(wrong)}")
        if wrong:
            raise wrong[0]
        return [known[row] for row in self.found.rows]

    def _twins(self) -> list[int]:
        rows: dict[str, dict[int, int]] = defaultdict(dict)
        for index, (row, facts) in enumerate(zip(self.found.rows, self.facts)):
            rows[facts.digest].setdefault(row, index)
        return [index for same in rows.values() for index in list(same.values())[1:]]

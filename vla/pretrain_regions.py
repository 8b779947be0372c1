"""Second stage of the embedded pair's pretraining: features that stay where the drawing is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from mmpeft.embedded.augment import StyleAugment
from mmpeft.embedded.store import read_card
from mmpeft.errors import ConfigError
from mmpeft.methods.base import Method
from mmpeft.types import AnyModule, Kwargs
from mmpeft.vla.backbone import CONFIG, create, folder_of, tokenizer, vit_emoji_64
from mmpeft.vla.pretrain import PairPretraining
from mmpeft.vla.taps import image_taps, projection


class RegionPretraining(PairPretraining):
    """Goes on with a pair on mosaics of four drawings: the mean feature under each drawing meets its caption.

    A pair that only saw one drawing at a time spreads what it is over all patches, and no decoder finds it again.
    Mosaics as pseudo regions: CLIM, arXiv:2312.11376. Some steps show single drawings as before, so that whole
    images are not forgotten. Half of the pictures lie on white paper.
    """

    def __init__(
        self,
        start: str = "embedded:clip_emoji",
        method: Method | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        mosaic: float = 0.6,
        kind_weight: float = 0.5,
        smoothing: float = 0.1,
        seed: int = 0,
        name: str = "clip_emoji",
        folder: str | None = None,
    ) -> None:
        """
        Args:
            start: the pair to go on with, by any name of a folder.
            mosaic: share of the steps that show mosaics.
            kind_weight: of the cross entropies over kinds and categories, beside the contrast with captions.
            smoothing: label smoothing of those.
            folder: where the folder `<name>` is written when training ends; None for `weights` in the run's folder.
        """
        found = folder_of(start)
        if found is None:
            raise ConfigError(f"start is a pair in a folder or an embedded one, got {start!r}")
        if not 0 <= mosaic <= 1:
            raise ConfigError(f"mosaic is a share of steps in [0, 1], got {mosaic}")
        self.pair = found
        config = read_card(found / CONFIG)["model_cfg"]
        options: Kwargs = {"kind_weight": kind_weight, "smoothing": smoothing, "seed": seed}
        super().__init__(
            config, method, optimizer, warmup, "vit_emoji", image_lr=1.0, name=name, folder=folder, **options
        )
        self.mosaic = mosaic
        self.scattered = StyleAugment(scale=(0.5, 1.1), shift=0.25, p_white=0.5)

    def build(self) -> nn.Module:
        folder = self.target() / self.name
        if folder.resolve() != self.pair.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            for path in (self.pair / CONFIG, *self.pair.glob("tokenizer*.json")):
                shutil.copyfile(path, folder / path.name)
        self.tokenizer = tokenizer(str(folder))
        model: AnyModule = create(str(self.pair))
        trunk = vit_emoji_64(dynamic_img_size=True)
        trunk.load_state_dict(model.visual.trunk.state_dict())
        model.visual.trunk = trunk
        self.unfuse()
        return model  # type: ignore[no-any-return]  # open_clip is not followed

    def loss(self, batch: tuple[Tensor, Sequence[str], Tensor], index: int) -> Tensor:
        drawings, texts, labels = batch
        if float(torch.rand((), generator=self.generator)) >= self.mosaic:
            return super().loss(batch, index)
        whole = len(drawings) // 4 * 4
        features = self.regions(drawings[:whole])
        return self.total(self.naming(features, texts[:whole], labels[:whole]), whole)

    def regions(self, drawings: Tensor) -> Tensor:
        """Unit features [4B, e] of drawings [4B, 4, S, S] in mosaics: the mean of the patches each covers."""
        pictures, cover = self.scattered.mosaic(drawings.float() / 255, self.generator)
        taps, model = image_taps(self.model), self.model
        last = len(taps.paths) - 1
        patches = taps.patches(taps((pictures - 0.5) / 0.5, [last])[last]).float()
        side = round(patches.shape[1] ** 0.5)
        share = F.adaptive_avg_pool2d(cover, side).flatten(2)
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-4)
        return F.normalize(projection(model)(share @ patches).flatten(0, 1).float(), dim=-1)

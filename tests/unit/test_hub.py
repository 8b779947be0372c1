"""Adapters to and from a hub in memory; the library of the hub runs as it is."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import mmpeft
from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.hub import reach
from tests.support.hub import MemoryHub

timm = pytest.importorskip("timm")
hub_library = pytest.importorskip("huggingface_hub")


def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=3)


def tuned(method: mmpeft.Method) -> tuple[Any, mmpeft.Tuning]:
    found = model()
    tuning = mmpeft.attach(found, method)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(0, 0.1)
    return found.eval(), tuning


def test_up_and_down(hub: MemoryHub) -> None:
    here, tuning = tuned(mmpeft.LoRA(rank=2, at="attn.{q,v}"))
    address = tuning.push_to_hub(
        "someone/birds", base_model="timm/vit_tiny", data="CUB-200", scores={"val/accuracy": 0.81}, license="mit"
    )
    assert "someone/birds" in address
    files = hub.files["someone/birds"]
    assert {"README.md", "adapter.json", "peft/adapter_config.json", "peft/adapter_model.safetensors"} <= set(files)
    assert not any(name.endswith((".bin", ".py", ".pkl")) for name in files)

    there = model().eval()
    mmpeft.load(there, "someone/birds")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(there(images), here(images))


def test_the_card_says_what_it_is(hub: MemoryHub) -> None:
    _, tuning = tuned(mmpeft.LoRA(rank=2) + mmpeft.BitFit())
    tuning.push_to_hub("someone/birds", base_model="timm/vit_tiny", scores={"val/accuracy": 0.81}, license="mit")
    card = hub_library.ModelCard(hub.files["someone/birds"]["README.md"].decode())
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("mmpeft", "timm/vit_tiny", "mit")
    for said in (
        "VisionTransformer",
        "rank=2",
        "2106.09685",
        "val/accuracy | 0.8100",
        'mmpeft.load(model, "someone/birds")',
    ):
        assert said in card.text
    assert f"{tuning.report().trainable:,}" in card.text


def test_what_peft_has_not_is_not_promised_for_it(hub: MemoryHub) -> None:
    _, tuning = tuned(mmpeft.AdaptFormer(bottleneck=2))
    tuning.push_to_hub("someone/birds")
    assert "PeftModel" not in hub.files["someone/birds"]["README.md"].decode()
    assert not any(name.startswith("peft/") for name in hub.files["someone/birds"])


def test_no_right_to_write(hub: MemoryHub) -> None:
    hub.may_write = False
    _, tuning = tuned(mmpeft.BitFit())
    with pytest.raises(ConfigError, match=r"cannot upload to someone/birds.*hf auth login"):
        tuning.push_to_hub("someone/birds")
    with pytest.raises(ConfigError, match="expected user/repository"):
        tuning.push_to_hub("birds")


def test_no_such_repository_and_no_network(hub: MemoryHub) -> None:
    with pytest.raises(AdapterFileError, match="nobody/nothing is no path here, and cannot be fetched"):
        mmpeft.load(model(), "nobody/nothing")
    hub.down = True
    reach.reachable.cache_clear()
    start = time.monotonic()
    with pytest.raises(AdapterFileError, match="does not answer"):
        mmpeft.load(model(), "nobody/nothing")
    assert time.monotonic() - start < 10  # retries would take a minute
    assert len(hub.asked) < 10


def test_a_backbone_by_name_without_a_network(hub: MemoryHub) -> None:
    from mmpeft.vision.backbone import create

    hub.down = True
    with pytest.raises(ConfigError, match="does not answer"):
        create("vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=2)
    assert len(hub.asked) == 1  # whether it answers, and nothing more


def test_the_base_comes_first(hub: MemoryHub) -> None:
    with pytest.raises(ConfigError, match=r"mmpeft\.load\(model, 'someone/birds'\)"):
        mmpeft.load("someone/birds", "default")  # type: ignore[arg-type]

"""What a bank writes: everything survives a new process, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mmpeft.bank import Bank, LinearHead, RidgeHead
from mmpeft.errors import AdapterFileError
from tests.unit.filled_bank import KINDS, X, filled
from tests.unit.toy import Toy

CHILD = """
import sys, torch, mmpeft
from mmpeft.bank import Bank, LinearHead
from tests.unit.toy import Toy
x = torch.load(sys.argv[1] + "/x.pt")
bank = Bank.load(Toy(), sys.argv[1]).eval()
out = {n: bank.features(x, n) for n in bank.ids}
out["scores"] = bank["a"].head(out["a"]), bank["c"].head(out["c"])
bank.add_task("later", mmpeft.LoRA(at="attn.q"), LinearHead(3, [7, 8]))
out["keys"], out["meta"] = bank["a"].keys, bank["a"].meta
out["trains"] = [n for n in bank.ids if any(p.requires_grad for p in bank.parameters_of(n))]
torch.save(out, sys.argv[1] + "/out.pt")
"""


def test_everything_survives_a_new_process_and_grows_on(tmp_path: Path) -> None:
    bank = filled({"a": KINDS["lora"], "b": KINDS["adapter"], "c": KINDS["full"]})
    bank["a"].head = LinearHead(3, range(3))
    bank["a"].learned["key"] = nn.Parameter(torch.randn(1, 3))
    bank["c"].head = RidgeHead(3, size=16)
    bank["c"].head.fit(bank.features(X, "c"), torch.tensor([4, 5, 4, 5, 4, 5]))
    bank["a"].state["basis"] = torch.randn(4, 2)
    bank["a"].meta["task"] = 1
    bank.freeze("a")
    folder = bank.save(tmp_path)
    torch.save(X, tmp_path / "x.pt")
    expected = {name: bank.features(X, name) for name in bank.ids}
    subprocess.run([sys.executable, "-c", CHILD, str(folder)], check=True, cwd=Path(__file__).parents[2])
    found = torch.load(tmp_path / "out.pt")
    for name, features in expected.items():
        assert torch.equal(found[name], features)
    assert torch.equal(found["scores"][0], bank["a"].head(expected["a"]))
    assert torch.equal(found["scores"][1], bank["c"].head(expected["c"]))
    assert torch.equal(found["keys"], bank["a"].keys)
    assert found["meta"] == {"task": 1}
    assert found["trains"] == ["b", "c", "later"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    bank.remove("b")
    bank.save(folder)
    assert Bank.load(Toy(), folder).ids == ["a", "c"]


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    folder = filled().save(tmp_path)
    other = Toy(seed=1)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    expected = json.loads((folder / "bank.json").read_text())["entries"][0]["base"]["fingerprint"]
    with pytest.raises(AdapterFileError, match=f"another base: expected Toy {expected}, this model is Toy [0-9a-f]+"):
        Bank.load(other, folder)
    assert type(other) is Toy
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    file = next(folder.glob("entry-wide-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(AdapterFileError, match="truncated"):
        Bank.load(Toy(), folder)
    with pytest.raises(AdapterFileError, match=r"no bank\.json"):
        Bank.load(Toy(), tmp_path / "nothing")


def test_the_manifest_has_a_version_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    folder = filled().save(tmp_path)
    manifest = folder / "bank.json"
    found = json.loads(manifest.read_text())
    assert [entry["id"] for entry in found["entries"]] == list(KINDS)
    assert len(list(folder.glob("*.safetensors"))) == len(KINDS)  # one file an entry
    manifest.write_text(json.dumps(found | {"version": found["version"] + 1}))
    with pytest.raises(AdapterFileError, match=f"version {found['version'] + 1}, this mmpeft reads up to"):
        Bank.load(Toy(), folder)
    manifest.write_text(json.dumps({k: v for k, v in found.items() if k != "version"}))
    with pytest.raises(AdapterFileError, match="only a part of one"):
        Bank.load(Toy(), folder)

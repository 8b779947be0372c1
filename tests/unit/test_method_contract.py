"""What a method gives when it is placed, what it says that it needs, and methods written for the former contract."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import mmpeft
from mmpeft.controllers import Controller
from mmpeft.errors import ConfigError, Refused, SiteError
from mmpeft.methods import METHODS, Need, Placed, Traits, at_site
from mmpeft.methods.base import Method, Sited
from mmpeft.methods.former import FormerContract, place
from mmpeft.sites import sites
from tests.unit.toy import Toy


def placed(method: Method, model: torch.nn.Module) -> Placed:
    return place(method, model, sites(model))


class Counting(Controller):
    pass


class Plain(mmpeft.Pfeiffer):
    """A third party's method that gives a list."""

    def place(self, model, available):
        return [*super().place(model, available)]


class Former(mmpeft.AdaLoRA):
    """A third party's method with the former functions."""

    def controllers(self, placements):
        return [*super().controllers(placements), Counting()]

    def compact(self, placements):
        method, tensors = super().compact(placements)
        return replace(method, at=method.at + "|mlp.up & depth=77"), tensors

    @property
    def identity(self):
        return False


def test_a_list_of_placements_stands_for_parts_that_nothing_drives() -> None:
    model = Toy()
    tuning = mmpeft.attach(model, Plain(at="block", bottleneck=2))
    assert len(tuning.placements) == 2
    assert not tuning.controllers
    assert tuning.inference_form()[0] is tuning.method


def test_former_functions_count_still_and_may_ask_those_above() -> None:
    method = Former(rank=2, target=1)
    with pytest.warns(DeprecationWarning, match="Former overrides controllers and compact: .*Placed"):
        found = placed(method, Toy())
    assert [type(c).__name__ for c in found.controllers] == ["RankAllocation", "Counting"]
    for part in (p.part for p in found):
        torch.nn.init.ones_(part.factor.g)
    left = found.baked()
    assert left is not None
    assert left[0].at.endswith("depth=77")
    assert len(left[1]) == len(found)


def test_a_property_of_a_third_party_counts_in_unions_and_wrappers() -> None:
    method = Former(rank=2, target=1)
    assert method.identity is False
    assert (method + mmpeft.BitFit()).identity is method.where("depth>=0").identity is False
    assert Traits.of(mmpeft.LoRA()) == Traits(mergeable=True, identity=True, sitewise=True)


def test_the_former_functions_of_a_method_say_what_took_their_place() -> None:
    for name in ("controllers", "compact"):
        with pytest.raises(ConfigError, match=f"Method.{name}.* is no more.*bake"):
            getattr(mmpeft.AdaLoRA(), name)([])


def test_no_method_of_the_suite_uses_the_former_contract() -> None:
    for cls in METHODS.values():
        assert cls.controllers is FormerContract.controllers
        assert cls.compact is FormerContract.compact


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_what_is_left_is_that_of_the_copy(way) -> None:
    model = Toy()
    mmpeft.attach(model, mmpeft.SoRA(rank=4) + mmpeft.BitFit())
    twin = way(model)
    (tuning,) = mmpeft.tunings(twin).values()
    with torch.no_grad():
        for p in tuning.placements:
            if hasattr(p.part, "factor"):
                p.part.factor.g.zero_()
                p.part.factor.g[0] = 1.0
    method, _, _ = tuning.inference_form()
    assert method.methods[0].rank == 1
    (untouched,) = mmpeft.tunings(model).values()
    assert untouched.inference_form()[0].methods[0].rank == 4


@dataclass(frozen=True)
class Picky(Sited):
    at: str = "attn.q"
    needs: ClassVar[tuple[Need, ...]] = (Need("a head to please", "head", tensors=True),)
    refuses: ClassVar = (at_site(lambda site: site.depth == 1, "depth {site.depth} is no good; take at='depth=0'"),)

    def place(self, model, available):
        raise AssertionError("never reached")

    def count(self, model, available):
        return 0


def test_a_missing_need_and_a_refused_fact_are_said_before_anything_is_placed() -> None:
    with pytest.raises(Refused, match=r"^Picky at attn\.q@.*: depth 1 is no good; take at='depth=0'"):
        mmpeft.attach(Toy(), Picky())
    model = Toy()
    model.head = torch.nn.Identity()
    available = [site for site in sites(Toy()) if site.role != "head"]
    with pytest.raises(SiteError, match=r"^Picky needs a head to please, and this model has none: no site 'head' with"):
        Picky().check(model, available)
    with pytest.raises(SiteError, match=r"^LoRA needs sites at='cross.q', and this model has none: 'cross.q' in at="):
        mmpeft.attach(Toy(), mmpeft.BitFit() + mmpeft.LoRA(at="cross.q"))


def test_needs_of_methods_inside_others_are_asked_for() -> None:
    lacking = mmpeft.CoOp()
    inside = [lacking.where("depth>=0"), mmpeft.BitFit() + lacking, mmpeft.gate(mmpeft.LoRA(at="kv|cross.q"))]
    for method in inside:
        with pytest.raises(SiteError, match=r"needs .*, and this model has none"):
            method.check(Toy(), sites(Toy()))

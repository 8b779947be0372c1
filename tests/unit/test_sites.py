"""The selector grammar and the anatomy registry."""

from __future__ import annotations

import pytest
from torch import nn

from mmpeft.errors import ConfigError, SiteError
from mmpeft.sites import ROLES, Site, sites
from mmpeft.sites.selector import select

SITES = [
    Site(f"blocks.{i}.{path}", role, i, tower, kind)
    for tower in ("image", "text")
    for i in range(4)
    for path, role, kind in (
        ("q", "attn.q", "linear"),
        ("v", "attn.v", "linear"),
        ("mlp.fc1", "mlp.up", "linear"),
        ("mlp", "mlp", "module"),
    )
]


def _names(selector: str) -> set[tuple[str, str, int]]:
    return {(s.tower, s.role, s.depth) for s in select(SITES, selector)}


def test_braces_towers_depths_and_unions() -> None:
    assert {role for _, role, _ in _names("attn.{q,v}")} == {"attn.q", "attn.v"}
    assert {tower for tower, _, _ in _names("image:attn.*")} == {"image"}
    assert {depth for _, _, depth in _names("mlp.* & depth>=2")} == {2, 3}
    assert {depth for _, _, depth in _names("attn.q & depth>=-1")} == {3}
    assert {role for _, role, _ in _names("attn.q | mlp & tower=text")} == {"attn.q", "mlp"}
    assert {tower for tower, role, _ in _names("attn.q | mlp & tower=text") if role == "mlp"} == {"text"}
    assert {role for _, role, _ in _names("mlp")} == {"mlp"}
    assert {s.path for s in select(SITES, "path=blocks.0.q")} == {"blocks.0.q"}
    assert len(select(SITES, lambda site: site.kind == "module")) == 8


def test_order_is_the_models_and_nothing_twice() -> None:
    found = select(SITES, "attn.v|attn.{q,v}")
    assert found == [s for s in SITES if s.role.startswith("attn.")]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("attn.{q,w}", r"'attn.w'.*roles here: image:attn.q ×4.*Did you mean 'attn.[qv]'"),
        ("atn.q", "Did you mean 'attn.q'"),
        ("mlp.* & depth>9", "matches no site"),
    ],
)
def test_one_alternative_without_a_match_is_an_error(selector: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        select(SITES, selector)


def test_a_default_may_match_in_part_but_not_at_all_is_an_error() -> None:
    assert select(SITES, "{attn.q,cross.q}", every=False)
    with pytest.raises(SiteError):
        select(SITES, "{conv,cross.q}", every=False)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("mlp & dept>=2", "unknown field 'dept'.*Did you mean 'depth'"),
        ("mlp & depth>=two", "integer"),
        ("attn.q & mlp", "never both hold"),
        ("attn.{q,v", "unbalanced"),
        ("attn.q||mlp", "empty alternative"),
        ("mlp & tower>image", "takes = or !="),
    ],
)
def test_malformed_selectors(selector: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(SITES, selector)


def test_model_of_unknown_inputs_says_what_to_give() -> None:
    with pytest.raises(SiteError, match=r"inputs of torch.nn.modules.container.Sequential.*example=batch"):
        sites(nn.Sequential(nn.Linear(3, 3)))


def test_every_role_is_described() -> None:
    assert all(ROLES.values())

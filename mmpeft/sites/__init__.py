"""Where a backbone can be tuned."""

from mmpeft.sites.site import (
    ROLES,
    Anatomy,
    Connect,
    Kind,
    Predicate,
    Selector,
    Site,
    Via,
    anatomy,
    find_anatomy,
    load_domains,
    param_sites,
    qualified_name,
    sites,
)

__all__ = [
    "ROLES",
    "Anatomy",
    "Connect",
    "Kind",
    "Predicate",
    "Selector",
    "Site",
    "Via",
    "anatomy",
    "find_anatomy",
    "load_domains",
    "param_sites",
    "qualified_name",
    "sites",
]

"""Where a backbone can be tuned: found by watching the model run."""

from mmpeft.sites.known import remember, remembered, sites, structure, watched_sites
from mmpeft.sites.notes import example_inputs, inputs_of, note, prepares, while_watching
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
    "example_inputs",
    "find_anatomy",
    "inputs_of",
    "load_domains",
    "note",
    "param_sites",
    "prepares",
    "qualified_name",
    "remember",
    "remembered",
    "sites",
    "structure",
    "watched_sites",
    "while_watching",
]

"""Packages: `mmpeft`, and each domain folder beside it, which installs as `mmpeft.<domain>`."""

from setuptools import find_packages, setup

DOMAINS = ("vision", "vla", "diffusion", "llm")

setup(
    packages=[
        *find_packages(include=["mmpeft", "mmpeft.*"]),
        *(f"mmpeft.{name}" for name in find_packages(include=[p for d in DOMAINS for p in (d, f"{d}.*")])),
    ],
    package_dir={"mmpeft": "mmpeft", **{f"mmpeft.{domain}": domain for domain in DOMAINS}},
)

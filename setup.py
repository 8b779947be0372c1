"""Packages: `mmpeft`, each domain folder beside it as `mmpeft.<domain>`, and the configurations as `mmpeft.configs`."""

from setuptools import find_packages, setup

DOMAINS = ("vision", "vla", "diffusion", "llm")

setup(
    packages=[
        *find_packages(include=["mmpeft", "mmpeft.*"]),
        "mmpeft.configs",
        *(f"mmpeft.{name}" for name in find_packages(include=[p for d in DOMAINS for p in (d, f"{d}.*")])),
    ],
    package_dir={"mmpeft": "mmpeft", **{f"mmpeft.{folder}": folder for folder in (*DOMAINS, "configs")}},
)

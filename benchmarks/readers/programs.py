"""The programs whose readers are tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """A program with loaders of adapter files: where its checkout lies under the sources, and what it is given."""

    name: str
    folder: str = ""
    package: str = ""
    """Name on the package index, where it is installed in place of a checkout."""
    formats: tuple[str, ...] = ("diffusers", "kohya", "comfy")
    kinds: tuple[str, ...] = ("SD 1.5", "SDXL", "SD3", "Flux", "PixArt")


PROGRAMS = {
    "diffusers_library": Program("diffusers", package="diffusers", formats=("diffusers", "kohya")),
    "comfyui": Program("ComfyUI", "ComfyUI"),
    "sd_scripts": Program("sd-scripts", "sd-scripts", formats=("kohya",), kinds=("SD 1.5", "SDXL", "SD3", "Flux")),
    "a1111": Program("A1111", "stable-diffusion-webui", formats=("kohya", "diffusers"), kinds=("SD 1.5", "SDXL")),
    "forge": Program("Forge", "stable-diffusion-webui-forge", kinds=("SD 1.5", "SDXL", "Flux")),
    "invokeai": Program("InvokeAI", "InvokeAI", formats=("kohya", "diffusers"), kinds=("SD 1.5", "SDXL", "Flux")),
    "sdnext": Program("SD.Next", "sdnext", formats=("kohya", "diffusers"), kinds=("SD 1.5", "SDXL", "SD3", "Flux")),
    "lycoris_lora": Program(
        "LyCORIS", package="lycoris-lora", formats=("kohya",), kinds=("SD 1.5", "SDXL", "SD3", "Flux")
    ),
}
"""Module of this package → its program."""

"""UNet and DiT backbones through diffusers."""

"""Vision backbones and tasks through timm and torchvision."""

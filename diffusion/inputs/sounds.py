"""What single classes for sound ask for beside, or otherwise than, the rules by a parameter's name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmpeft.diffusion.inputs.facts import ROWS, Denoiser, rotation
from mmpeft.types import Kwargs

Values = Kwargs


def _stable_audio(d: Denoiser) -> Values:
    width = d.size("global_states_input_dim", default=0)
    length = d.line + 1  # the global condition is a position of its own
    return {
        "global_hidden_states": d.noise(ROWS, 1, width),
        "rotary_embedding": rotation(length, d.size("attention_head_dim", default=0) // 2),
        "encoder_attention_mask": None,
    }


def _stable_audio_3(d: Denoiser) -> Values:
    local = d.size("local_add_cond_dim", default=0)
    return {
        "timestep": torch.tensor([0.1, 0.9]),
        "global_hidden_states": d.noise(ROWS, d.size("global_cond_dim", default=0)),
        "local_add_cond": d.noise(ROWS, local, d.line) if local else None,
    }


def _film(d: Denoiser) -> Values:
    width = d.size("d_model", default=0)
    length = d.size("targets_length", default=0)
    return {
        "encodings_and_masks": [(d.text(width), torch.ones(ROWS, d.text_length))],
        "decoder_input_tokens": d.noise(ROWS, length, d.size("input_dims", default=0)),
        "decoder_noise_time": torch.tensor([0.1, 0.9]),
    }


def _ace(d: Denoiser) -> Values:
    latent = d.size("audio_acoustic_hidden_dim", default=0)
    length, rest = 16 * d.patch[1], d.channels - latent
    width = d.size("encoder_hidden_size", "hidden_size", default=0)
    return {
        "hidden_states": d.noise(ROWS, length, latent),
        "context_latents": d.noise(ROWS, length, rest),
        "encoder_hidden_states": d.text(width),
        "timestep": torch.tensor([0.9, 0.5]),
        "timestep_r": torch.tensor([0.5, 0.1]),
    }


def _minimax_music(d: Denoiser) -> Values:
    return {"encoder_hidden_states": d.text(d.size("condition_dim", default=0), d.line)}


CASES: dict[str, Callable[[Denoiser], Values]] = {
    "AceStepTransformer1DModel": _ace,
    "MiniMaxMusic3Transformer1DModel": _minimax_music,
    "StableAudio3DiTModel": _stable_audio_3,
    "StableAudioDiTModel": _stable_audio,
    "T5FilmDecoder": _film,
}

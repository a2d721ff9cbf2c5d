"""Stable Diffusion XL in two pipelines: the base up to a share of the trajectory, the refiner from there on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor

import hasten
from families import FAMILIES
from hasten import Recipe

SDXL = FAMILIES[1]


def given(**more: Any) -> dict[str, Any]:
    return SDXL.inputs() | {"generator": torch.Generator().manual_seed(0), "output_type": "latent"} | more


def refiner(base: Any) -> Any:
    """Of the same network."""
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae, unet=base.unet, scheduler=type(base.scheduler).from_config(base.scheduler.config),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def halves(base: Any, fine: Any, share: float) -> Tensor:
    first = base(**given(num_inference_steps=10), denoising_end=share).images
    rest = {k: v for k, v in given(num_inference_steps=10).items() if k not in ("height", "width")}
    return fine(**rest, image=first, denoising_start=share).images


@pytest.mark.system("sdxl")
@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_base_and_refiner_of_one_network_are_one_chain(solver: str, share: float) -> None:
    """To the bit where a step knows nothing of the one before; a multistep solver starts anew at the refiner."""
    base = SDXL.build()
    fine, recipe = refiner(base), Recipe.from_dict({"solver": solver})
    with hasten.accelerate(base, recipe), hasten.accelerate(fine, recipe):
        whole = base(**given(num_inference_steps=10)).images
        both = halves(base, fine, share)
        early = base(**given(num_inference_steps=10), denoising_end=share).images
    if solver == "dpmpp_2m":
        assert 0 < (both - whole).abs().max() < 0.02 * whole.abs().max()
    else:
        assert torch.equal(both, whole)
    assert (early - whole).abs().max() > 0.03 * whole.abs().max()  # the base alone is not there yet


@pytest.mark.system("sdxl")
def test_a_cache_on_both_is_the_cache_on_one_chain() -> None:
    """The refiner's trajectory is one of its own, which starts with an evaluation in full."""
    base = SDXL.build()
    fine, recipe = refiner(base), Recipe.from_dict({"solver": "ddim", "methods": [{"cache.deep": {"every": 2}}]})
    with hasten.accelerate(base, recipe):
        whole = base(**given(num_inference_steps=10)).images
        first = base(**given(num_inference_steps=10), denoising_end=0.8).images
    with hasten.accelerate(fine, recipe):  # the two share the network, and one edit at a time holds it
        rest = {k: v for k, v in given(num_inference_steps=10).items() if k not in ("height", "width")}
        both = fine(**rest, image=first, denoising_start=0.8).images
    assert torch.equal(both, whole)

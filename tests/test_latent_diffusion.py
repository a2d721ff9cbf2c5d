"""Latent diffusion from its parts, on digits: an autoencoder, latents of unit variance, a U-Net that reads names by
cross-attention, drawn by diffusers' own pipeline; and what makes pipelines faster, on this one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

import hasten
from digits import fitted, written_digits
from digits_unet import NOTHING, labels
from hasten import Recipe
from hasten.bridge.drawing import quiet
from hasten.measure.frechet import Moments, frechet

WORDS, WIDTH, LEARNED = 2, 16, 1200
"""Words a name, their width, and of the digits how many are learned from; the others are held out."""

pytestmark = pytest.mark.system("ldm")


@cache
def pictures() -> Tensor:
    """[1797, 3, 16, 16]: as pipelines take them, each pixel four."""
    return written_digits().view(-1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


@cache
def autoencoder() -> AutoencoderKL:
    """f2, two channels, with a small weight on the divergence; its factor is of what it has learned from."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    x, rng = pictures()[:LEARNED], torch.Generator().manual_seed(0)

    def loss(_: int) -> Tensor:
        some = x[torch.randint(len(x), (32,), generator=rng)]
        z = vae.encode(some).latent_dist
        return (vae.decode(z.sample(rng)).sample - some).square().mean() + 1e-4 * z.kl().mean()

    fitted(list(vae.parameters()), 250, 5e-3, loss)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / float(vae.encode(x).latent_dist.sample(rng).std()))
    return vae.eval()


@cache
def trained() -> tuple[Any, nn.Embedding]:
    """A pipeline whose U-Net says eps on Stable Diffusion's table, and the words of each name."""
    vae, names = autoencoder(), labels()[:LEARNED]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    words, rng = nn.Embedding(11, WORDS * WIDTH), torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = vae.encode(pictures()[:LEARNED]).latent_dist.sample(rng) * vae.config.scaling_factor

    def loss(_: int) -> Tensor:
        n, t = torch.randint(len(z), (32,), generator=rng), torch.randint(1000, (32,), generator=rng)
        eps = torch.randn(z[n].shape, generator=rng)
        y = torch.where(torch.rand(32, generator=rng) < 0.15, NOTHING, names[n])
        said = unet(scheduler.add_noise(z[n], eps, t), t, words(y).unflatten(1, (WORDS, WIDTH))).sample
        return (said - eps).square().mean()

    fitted([*unet.parameters(), *words.parameters()], 500, 4e-3, loss)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipe), words


def drawn(names: Tensor, steps: int = 15) -> Tensor:
    """[N, 64]: the pictures that the pipeline draws, a pixel each."""
    pipe, words = trained()
    with torch.no_grad():
        text, none = (words(y).unflatten(1, (WORDS, WIDTH)) for y in (names, torch.full_like(names, NOTHING)))
    out = pipe(
        prompt_embeds=text, negative_prompt_embeds=none, height=16, width=16, num_inference_steps=steps,
        guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    return nn.functional.avg_pool2d(out.mean(1, keepdim=True), 2).flatten(1) * 2 - 1


def test_latents_have_unit_variance_and_are_decoded_again() -> None:
    """Of digits that the autoencoder has not seen."""
    vae, x = autoencoder(), pictures()[LEARNED:]
    with torch.no_grad():
        z = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(1)) * vae.config.scaling_factor
        back = vae.decode(z / vae.config.scaling_factor).sample
    assert float(z.std()) == pytest.approx(1, abs=0.05)
    assert float((back - x).square().mean()) < 0.1 * float((x - x.mean(0)).square().mean())


def test_it_draws_digits_of_the_names_that_it_reads() -> None:
    """Told by the nearest mean of true digits; and all together are near true ones in Frechet's distance."""
    x, names = written_digits(), labels()
    asked = torch.arange(10).repeat(20)
    made = drawn(asked)
    means = torch.stack([x[names == n].mean(0) for n in range(10)])
    right = torch.cdist(made, means).argmin(1) == asked
    assert float(right.float().mean()) > 0.7
    truth = Moments.of(x[LEARNED:])
    noise = Moments.of(torch.rand(200, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert frechet(Moments.of(made), truth) < 0.3 * frechet(noise, truth)


@pytest.mark.parametrize("method", ["cache.deep", "cache.text", "cache.token", "tokens.downsample", "attention.exact"])
def test_what_makes_pipelines_faster_serves_it(method: str) -> None:
    pipe, _ = trained()
    asked = torch.arange(10)
    before = drawn(asked)
    kind = hasten.tree.method(method)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{method: dict(kind.neutral or {})}]})):
        assert torch.equal(drawn(asked), before)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [method]})):
        fast = drawn(asked)
    assert float((fast - before).square().mean()) < 0.1 * float(before.var())
    assert torch.equal(drawn(asked), before)

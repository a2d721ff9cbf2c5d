"""The embedded Stable Diffusion: plain diffusers loads it, it follows its prompts, and its training is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from plain import drawn, follows

import hasten
from hasten import Recipe, reference
from hasten.bridge import small, small_sd
from hasten.bridge.drawing import draw, quiet
from hasten.objectives.pretrain.v_prediction import VPrediction
from hasten.paths.discrete import scaled_linear, to_pure_noise
from hasten.reference import emoji, training_unet
from hasten.train.optimizer import trapezoid


def load() -> Any:
    return quiet(reference.pipeline("emoji-unet"))


def test_plain_diffusers_loads_it_without_hasten() -> None:
    complaints = drawn(reference.folder("emoji-unet"), "StableDiffusionPipeline", "unet")
    assert "safety" not in complaints
    assert "deprecat" not in complaints.lower()


def test_weights_are_small_and_safe_and_tell_no_place() -> None:
    files = [f for f in reference.folder("emoji-unet").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    for file in files:
        assert file.suffix != ".json" or "_name_or_path" not in json.loads(file.read_text()), file


def test_it_has_the_autoencoder_and_the_words_of_emoji_flow() -> None:
    flow, unet = reference.folder("emoji-flow"), reference.folder("emoji-unet")
    for file in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (flow / file).read_bytes() == (unet / file).read_bytes(), file
    words = [json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"] for folder in (flow, unet)]
    assert words[0] == words[1]


def test_it_was_trained_on_the_table_of_its_scheduler() -> None:
    """Stable Diffusion's betas at zero terminal signal-to-noise ratio: where the network starts there is only noise."""
    scheduler = load().scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.prediction_type == "v_prediction"
    path = to_pure_noise(scaled_linear())
    assert torch.allclose(scheduler.alphas_cumprod.double(), torch.tensor(path.alpha_bar).double(), atol=1e-6)
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 999


def tiny() -> Any:
    """The pipeline around an untrained U-Net of a thousandth of the work; outputs of its blocks are not zero."""
    pipe = load()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, cross_attention_dim=128, norm_num_groups=4, use_linear_projection=True,
    )  # fmt: skip
    return pipe


def test_what_is_trained_is_what_the_pipeline_calls() -> None:
    """`TextToV` at table steps against the parts as the pipeline calls them, with diffusers' own attention."""
    pipe = tiny()
    rng = torch.Generator().manual_seed(0)
    x, steps = torch.randn(3, 4, 16, 16, generator=rng), torch.tensor([0, 499, 999])
    words = ["a red apple", "", "flag: japan"]
    with torch.no_grad():
        v = small_sd.TextToV(pipe)(x, (steps + 1) / 1000, small.ids(pipe, words))
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        text, _ = pipe.encode_prompt(words, "cpu", 1, False)
        assert torch.allclose(pipe.unet(x, steps, text).sample, v, atol=1e-5)


def test_its_training_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps at once, and two, a new process's objects, then two: the same weights, bit for bit."""
    z = torch.randn(len(emoji.entries()), 4, 16, 16, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(small, "latents", lambda vae, pixels: z)
    monkeypatch.setattr(training_unet, "trapezoid", lambda until, warmup: trapezoid(4, 2))  # that of the whole run
    kernel = "unet.down_blocks.0.resnets.0.conv1.weight"

    def trained(folder: str, *until: int) -> dict[str, torch.Tensor]:
        for n in until:
            pipe = tiny()
            training_unet.train_unet(pipe, tmp_path / folder, torch.empty(0), n, device="cpu", size=4)
        return small_sd.TextToV(pipe).state_dict()

    whole, parts = trained("a", 4), trained("b", 2, 4)
    assert whole.keys() == parts.keys()
    assert [k for k in whole if not torch.equal(whole[k], parts[k])] == []
    assert not torch.equal(whole[kernel], small_sd.TextToV(tiny()).state_dict()[kernel])


def test_its_loss_is_near_what_training_reached() -> None:
    """Of 128 pictures at even times; an untrained network's is about 1, and another picture's caption doubles it."""
    pipe, entries = load(), emoji.entries()
    rows = range(0, len(entries), -(-len(entries) // 128))
    x0 = small.latents(pipe.vae, emoji.pictures()[list(rows)].float() / 127.5 - 1)
    ids = small.ids(pipe, [entries[i].caption() for i in rows])
    objective = VPrediction(to_pure_noise(scaled_linear()))

    def loss(ids: torch.Tensor) -> float:
        with torch.no_grad():
            told = {"x0": x0, "ids": ids}
            return float(objective.loss({"denoiser": small_sd.TextToV(pipe)}, told, torch.Generator().manual_seed(2)))

    assert loss(ids) < 0.32
    assert loss(ids.roll(1, 0)) > 1.7 * loss(ids)


def test_it_follows_its_prompts() -> None:
    assert follows(load()) >= 0.75


def test_hastens_ddim_draws_what_its_own_scheduler_draws() -> None:
    pipe = load()
    prompts, seeds = ["a red apple", "grinning face"], [1, 2]
    own = torch.cat(list(draw(pipe, prompts, seeds, 2, num_inference_steps=8)))
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "ddim", "steps": 8})):
        ours = torch.cat(list(draw(pipe, prompts, seeds, 2, num_inference_steps=8)))
    assert (ours - own).abs().mean() < 1e-3
    assert torch.equal(torch.cat(list(draw(pipe, prompts, seeds, 2, num_inference_steps=8))), own)

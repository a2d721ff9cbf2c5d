"""The small Stable Diffusion: plain diffusers loads what training writes, and its training is what it says. (No weights
are shipped yet.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from plain import drawn

from hasten import reference
from hasten.bridge import small, small_sd
from hasten.bridge.drawing import quiet
from hasten.paths.discrete import scaled_linear, to_pure_noise
from hasten.reference import emoji, training_unet
from hasten.train.optimizer import trapezoid


def load() -> Any:
    """As training starts: untrained, with the words and the autoencoder of emoji-flow."""
    flow: Any = reference.pipeline("emoji-flow")
    return quiet(small_sd.pipeline(flow.tokenizer, flow.vae, flow.text_encoder))


def test_plain_diffusers_loads_what_is_written_without_hasten(tmp_path: Path) -> None:
    small_sd.write(load(), tmp_path / "pipe")
    complaints = drawn(tmp_path / "pipe", "StableDiffusionPipeline", "unet")
    assert "safety" not in complaints
    assert "deprecat" not in complaints.lower()
    files = [f for f in (tmp_path / "pipe").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    for file in files:
        assert file.suffix != ".json" or "_name_or_path" not in json.loads(file.read_text()), file


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

"""The embedded pipeline: plain diffusers loads it, its data is what it says, its parts are as good as claimed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain import drawn, follows

import hasten
from hasten import Recipe, reference
from hasten.bridge import small_sd3
from hasten.bridge.drawing import draw, quiet
from hasten.reference import emoji
from hasten.reference.training import captions, psnr


def test_data_is_whole_and_named() -> None:
    pictures, entries = emoji.pictures(), emoji.entries()
    assert len(pictures) == len(entries) == 3786
    white = (pictures.flatten(1) == 255).all(1).sum()
    assert white == 0
    assert sum(bool(e.tone) for e in entries) == 1875
    by_name = {n: e for e in entries for n in e.names()}
    for name in ("red apple", "pizza", "rocket", "flag: japan", "sunflower", "dog face", "dog"):
        assert name in by_name, name
    assert emoji.weights().sum() == pytest.approx(1911 + 1875 / 6)
    data = Path(emoji.__file__).parent / "data"
    assert sum(f.stat().st_size for f in data.iterdir()) < 12e6


def test_a_resumed_training_reads_the_words_of_the_first_run(tmp_path: Path) -> None:
    first = small_sd3.kept_tokenizer(tmp_path / "tokenizer", captions)
    again = small_sd3.kept_tokenizer(tmp_path / "tokenizer", lambda: pytest.fail("learned anew"))
    assert first.get_vocab() == again.get_vocab()
    texts = ["a red apple", "Flagge: Österreich", "火", ""]
    ids = [t(texts, padding="max_length", truncation=True).input_ids for t in (first, again)]
    assert ids[0] == ids[1]
    assert {len(row) for row in ids[0]} == {16}


def test_captions_are_drawn_from_a_generator_alone() -> None:
    entry = next(e for e in emoji.entries() if e.tone == "dark")
    a, b = ([entry.caption(torch.Generator().manual_seed(s)) for s in range(40)] for _ in range(2))
    assert a == b
    assert len(set(a)) > 5
    assert all("dark skin" in c for c in a)


def test_plain_diffusers_loads_it_without_hasten() -> None:
    drawn(reference.folder("emoji-flow"), "StableDiffusion3Pipeline", "transformer")


def test_weights_are_small_and_safe() -> None:
    files = [f for f in reference.folder("emoji-flow").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}


def test_autoencoder_gives_pictures_back() -> None:
    """30 dB over every picture, and latents of about unit scale."""
    vae = reference.pipeline("emoji-flow").vae
    x = emoji.pictures()[::20].float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encoder(x)
        assert psnr(vae.decoder(z), x) > 30
    assert float((z.std((0, 2, 3)) - 1).abs().max()) < 0.1


@pytest.mark.system("sd3", "rectified-flow")
def test_folding_its_256_zero_tokens_changes_nothing_but_rounding() -> None:
    pipe = quiet(reference.pipeline("emoji-flow"))
    prompts, seeds = ["a red apple", "grinning face"], [1, 2]
    plain = torch.cat(list(draw(pipe, prompts, seeds, 2, num_inference_steps=4)))
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": ["tokens.fold"]})) as handle:
        folded = torch.cat(list(draw(pipe, prompts, seeds, 2, num_inference_steps=4)))
        assert "tokens folded 1020" in str(handle)
    assert (folded - plain).abs().max() < 1e-3
    assert torch.equal(torch.cat(list(draw(pipe, prompts, seeds, 2, num_inference_steps=4))), plain)


def test_it_follows_its_prompts() -> None:
    assert follows(quiet(reference.pipeline("emoji-flow"))) >= 0.75

"""Save and load give the same bits; faults are one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from families import FAMILIES, sd3_with_words
from hasten import Recipe
from hasten.bridge import folders
from hasten.bridge.folders import ModelError

SD3 = FAMILIES[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = _loadable()
    hasten.save(pipe, _recipe(), folder)
    return folder


def _recipe() -> Recipe:
    return Recipe.from_dict(
        {"solver": "dpmpp_2m", "grid": "uniform", "steps": 4, "methods": [{"cache.interval": {"every": 2}}]}
    )


def _loadable() -> Any:
    """The tiny pixel-less family whose every part can be saved and read: a pipeline without text encoders needs
    none."""
    return FAMILIES[0].build()


def test_load_gives_the_same_bits(saved: Path) -> None:
    family, pipe = FAMILIES[0], _loadable()
    inputs = {"num_inference_steps": 4}
    with hasten.accelerate(pipe, _recipe()):
        want = family.call(pipe, **inputs)
    again = hasten.load(saved, safety_checker=None, text_encoder=None, tokenizer=None, feature_extractor=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(family.call(again, **inputs), want)
    again.hasten.remove()
    assert torch.equal(family.call(again, **inputs), family.call(pipe, **inputs))


def test_an_accelerated_pipeline_is_not_saved(tmp_path: Path) -> None:
    pipe = SD3.build()
    with hasten.accelerate(pipe, _recipe()), pytest.raises(ModelError, match=r"handle\.remove\(\)"):
        hasten.save(pipe, _recipe(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_failed_save_leaves_the_old_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(p.name for p in saved.parent.iterdir()), sorted(str(p) for p in saved.rglob("*"))
    pipe = _loadable()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipe), "save_pretrained", full)
    with pytest.raises(ModelError, match="No space left"):
        hasten.save(pipe, _recipe(), saved)
    assert (sorted(p.name for p in saved.parent.iterdir()), sorted(str(p) for p in saved.rglob("*"))) == before


def _broken(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "broken"))


def _weights(folder: Path) -> Path:
    return next((folder / "unet").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda f: _weights(f).write_bytes(_weights(f).read_bytes()[:-1000]), "truncated or corrupt"),
        (lambda f: _weights(f).write_bytes(b"\x00" * 200), "truncated or corrupt"),
        (lambda f: _weights(f).rename(_weights(f).with_name("diffusion_pytorch_model.bin")), "pickle"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "cannot be read"),
        (lambda f: __import__("shutil").rmtree(f / "vae"), "'vae'"),
        (lambda f: (f / "unet" / "config.json").unlink(), "cannot be loaded"),
    ],
    ids=["truncated", "garbage", "pickle", "no-index", "bad-index", "no-vae", "no-config"],
)
def test_broken_models_are_told_in_one_line(saved: Path, tmp_path: Path, fault: Any, said: str) -> None:
    folder = _broken(saved, tmp_path)
    fault(folder)
    with pytest.raises(ModelError, match=said) as error:
        folders.read(folder)
    assert "\n" not in str(error.value)


def test_a_pipeline_saved_without_its_further_text_encoders_is_read(tmp_path: Path) -> None:
    pipe = sd3_with_words()
    pipe.save_pretrained(tmp_path / "by-diffusers")
    folders.write(pipe, tmp_path / "by-hasten")
    for folder in tmp_path.iterdir():
        again = folders.read(folder)
        assert again.text_encoder_3 is None
        assert again.tokenizer_3 is None
        assert torch.equal(again.text_encoder_2.text_projection.weight, pipe.text_encoder_2.text_projection.weight)


def test_wrong_places(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    file.write_text("")
    for model, said in ((tmp_path / "none", "no such folder"), (file, "a file"), (tmp_path, "model_index")):
        with pytest.raises(ModelError, match=said):
            folders.read(model)

"""Features of CLIP, DINOv2 and Inception files are those that the networks' own libraries compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from hasten.bridge.features import encoder
from hasten.bridge.folders import ModelError
from hasten.measure.frechet import frechet_small
from hasten.tune.features import features

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


class Inception(nn.Module):
    """The interface of the file, with another network behind it."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = images.to(torch.float32) / 255
        return x.mean(dim=[2, 3]) if return_features else x


def pictures() -> Tensor:
    return torch.rand(5, 3, 40, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, projection_dim=6)).save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(tmp_path / "dino")
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessorPil(**size).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@pytest.mark.parametrize("which", ["clip", "dino"])
def test_an_encoders_features_are_its_librarys(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    kinds = {
        "clip": (CLIPVisionModelWithProjection, CLIPImageProcessorPil),
        "dino": (Dinov2Model, BitImageProcessorPil),
    }
    network, processor = (kind.from_pretrained(folder) for kind in kinds[which])
    pixels = (pictures().permute(0, 2, 3, 1) * 255).round().byte().numpy()
    with torch.no_grad():
        out = network.eval()(**processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt"))
    expected = out.image_embeds if which == "clip" else out.last_hidden_state[:, 0]
    read = features(str(folder))
    assert torch.allclose(read(pictures()), expected, atol=1e-5)
    assert which in read.name


def test_an_inception_file_gets_8_bit_pictures_and_is_asked_for_features(tmp_path: Path) -> None:
    torch.jit.script(Inception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    read = features(str(tmp_path / "inception-2015-12-05.pt"))
    assert torch.allclose(read(pictures()), pictures().mean((2, 3)), atol=1 / 255)
    again = read(pictures())
    assert frechet_small(again, again) == pytest.approx(0, abs=1e-6)


def test_a_broken_picture_has_nan_and_no_other_has(clip: Path) -> None:
    read, images = features(str(clip)), pictures()
    whole = read(images)
    images[1, 0, 3, 3] = torch.inf
    images[3, 2, 0, 0] = torch.nan
    found = read(images)
    assert found.isnan().all(1).tolist() == [False, True, False, True, False]
    assert torch.equal(found[[0, 2, 4]], whole[[0, 2, 4]])
    with pytest.raises(ValueError, match="float pictures"):
        read(images[0])


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pt").write_bytes(b"nothing")
    for given in ("empty", "x.pt", "none.pt", "none"):
        with pytest.raises(ModelError, match=given) as told:
            features(str(tmp_path / given))
        assert "\n" not in str(told.value)
    weights = clip / "model.safetensors"
    torch.save({}, clip / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        encoder(str(clip))

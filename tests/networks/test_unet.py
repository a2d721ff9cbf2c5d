"""The U-Net against diffusers' own with its weights; what it learns; what is found in it; what serves it."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from digits import fitted, written_digits
from hasten import moment, tree
from hasten.anatomy import anatomy
from hasten.method import Method, Refused, Stage
from hasten.moment import Moment
from hasten.networks.unet import UNet

pytestmark = pytest.mark.system("unet")


def small(dims: int = 2, channels: tuple[int, int] = (1, 1)) -> UNet:
    torch.manual_seed(0)
    return UNet(channels, (16, 32), layers=1, attend=(False, True), head=8, dims=dims)


@pytest.mark.parametrize("attend", [(False, True, True), (False, False, False), (True, True, False)])
def test_it_is_diffusers_own_with_the_same_weights(attend: tuple[bool, ...]) -> None:
    """The names of its weights are diffusers', and go there and back."""
    torch.manual_seed(0)
    ours = UNet((3, 6), (16, 32, 64), layers=2, attend=attend, head=8)
    theirs = UNet2DModel(
        in_channels=3, out_channels=6, block_out_channels=(16, 32, 64), layers_per_block=2, norm_num_groups=8,
        attention_head_dim=8, down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attend],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)],
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    with torch.no_grad():
        want = theirs(x, t).sample
        assert torch.allclose(ours(x, t), want, atol=1e-5)
        again = UNet((3, 6), (16, 32, 64), layers=2, attend=attend, head=8)
        again.load_state_dict(theirs.state_dict())
        assert torch.equal(again(x, t), ours(x, t))
        assert torch.allclose(again(x, 700)[1], want[1], atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_learns_in_every_number_of_dimensions(dims: int) -> None:
    """Digits as lines, pictures, or volumes of one layer above another: half of what an untrained one misses of the
    noise's direction."""
    data = written_digits()[:1024].view(-1, 1, *{1: (64,), 2: (8, 8), 3: (4, 4, 4)}[dims])
    net, rng = small(dims), torch.Generator().manual_seed(0)

    def loss(_: int) -> Tensor:
        x0 = data[torch.randint(len(data), (32,), generator=rng)]
        t, eps = torch.rand(32, generator=rng), torch.randn(x0.shape, generator=rng)
        w = t.view(-1, *[1] * (dims + 1))
        return (net((1 - w) * x0 + w * eps, t * 1000) - (eps - x0)).square().mean()

    def held() -> float:
        rng.manual_seed(9)
        with torch.no_grad():
            return sum(float(loss(0)) for _ in range(8)) / 8

    before = held()
    fitted(list(net.parameters()), 60, 4e-3, loss)
    assert held() < 0.5 * before


def test_stages_and_skips_are_found_by_name() -> None:
    """And every skip is read where anatomy says: a change of what a layer leaves reaches its reader on the way up."""
    net = UNet((1, 1), (16, 32, 64), layers=2, attend=(False, True, False), head=8)
    found = anatomy(net).unet
    assert found is not None
    assert [s.name for s in found.down] == ["down_blocks.0", "down_blocks.1", "down_blocks.2"]
    assert [s.name for s in found.up] == ["up_blocks.0", "up_blocks.1", "up_blocks.2"]
    assert found.middle is net.mid_block
    assert [len(s.layers) for s in found.down] == [2, 2, 2]
    assert [len(s.layers) for s in found.up] == [3, 3, 3]
    left: list[Tensor] = []
    read: list[Tensor] = []
    leaving = [net.conv_in]
    for stage in found.down:
        leaving += [layer[-1] for layer in stage.layers] + ([stage.sampler] if stage.sampler is not None else [])
    hooks = [m.register_forward_hook(lambda m, a, out: left.append(out)) for m in leaving]
    for stage in found.up:
        hooks += [layer[0].register_forward_pre_hook(lambda m, a: read.append(a[0])) for layer in stage.layers]
    with torch.no_grad():
        net(torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)), 5.0)
    assert len(left) == len(read) == 9
    for skip, joined in zip(reversed(left), read, strict=True):
        assert torch.equal(joined[:, -skip.shape[1] :], skip)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("label", [m for m in tree.methods() if m.startswith("cache.")])
def test_caches_serve_it(label: str, dims: int) -> None:
    """At the neutral setting bit for bit, or refused with a reason; gone without a trace."""
    kind = tree.method(label)
    net, g = small(dims).eval(), torch.Generator().manual_seed(0)
    xs = torch.randn(4, 2, 1, *[16] * dims, generator=g)

    def trajectory(run: int) -> list[Tensor]:
        out = []
        for step, x in enumerate(xs):
            with torch.no_grad(), moment.at(Moment(step, len(xs), 1 - step / 4, run=run)):
                out.append(net(x, 900.0 - 200 * step))
        return out

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    before, keys = trajectory(1), set(net.state_dict())
    try:
        patch = _made(kind, **kind.neutral or {}).apply(net)
    except Refused as refused:
        assert len(str(refused)) > 40
        return
    with patch:
        assert same(trajectory(2), before)
    assert same(trajectory(3), before)
    assert set(net.state_dict()) == keys


def _made(kind: type[Method], **settings: object) -> Method:
    assert kind.stage == Stage.CACHE
    return kind(**settings)


def test_deep_features_are_kept_in_one_dimension_too() -> None:
    """DeepCache on a network of trajectories: between key steps the inner stages do not run."""
    net, x = small(1).eval(), torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    ran = []
    inner = net.mid_block.forward
    net.mid_block.forward = lambda *a: (ran.append(1), inner(*a))[1]
    with tree.method("cache.deep")(every=3).apply(net), torch.no_grad():  # type: ignore[call-arg]
        for step in range(6):
            with moment.at(Moment(step, 6, run=1)):
                net(x + step, 100.0)
    assert len(ran) == 2


def test_what_does_not_fit_is_said() -> None:
    for given in ({"attend": (True,)}, {"dims": 4}):
        with pytest.raises(ValueError, match="a U-Net needs one of attend for each of the 2 widths"):
            UNet(widths=(8, 16), **given)  # type: ignore[arg-type]
    assert not any(isinstance(m, nn.Conv2d) for m in small(1).modules())

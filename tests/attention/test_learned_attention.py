"""SLA and linear attention: what they compute, and what tuning wins back on a network of digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from digits_dit import distance, drawn, held_out, learn, trained
from families import FAMILIES
from families_more import MORE
from hasten import Recipe, accelerate
from hasten.attention.learned import Learned
from hasten.attention.linear import Hedgehog, Linear
from hasten.attention.sla import Sla, classes
from hasten.kernels.block_sparse import reference
from hasten.kernels.linear_attention import LEAST
from hasten.method import Refused
from hasten.objectives.distill.attention import AttentionTransfer
from hasten.objectives.pretrain.flow_matching import FlowMatching

SD3 = FAMILIES[2]


class Beside(nn.Module):
    """A network and the layers that are tuned with it, as one."""

    def __init__(self, net: nn.Module, learned: Learned) -> None:
        super().__init__()
        self.net, self.learned = net, learned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


@pytest.mark.system("sla")
def test_classes_are_the_highest_the_lowest_and_those_between() -> None:
    scores = torch.randn(2, 3, 5, 20, generator=torch.Generator().manual_seed(0))
    index, marginal = classes(scores, 0.2, 0.3)
    for row, top, between in zip(*(x.flatten(0, 2).tolist() for x in (scores, index, marginal)), strict=True):
        order = sorted(range(20), key=lambda j: -row[j])
        assert sorted(top) == sorted(order[:4])
        assert sorted(j for j in range(20) if between[j]) == sorted(order[4:14])
    index, marginal = classes(scores, 0.01, 1.0 - 0.01)
    assert index.shape[-1] == 1
    assert not marginal.any()


class One(nn.Module):
    """A network of one attention, over places alone, of which every number is known."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.config = type("Config", (), {"patch_size": 1, "in_channels": 8})
        self.transformer_blocks = nn.ModuleList([Plain(heads)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.transformer_blocks[0](hidden_states.flatten(2).transpose(1, 2))


class Plain(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attn = Attention(heads)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.attn(hidden_states)


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(8, 8 * heads) for _ in range(3))

    def parts(self, x: Tensor) -> list[Tensor]:
        return [f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.parts(x))


@pytest.mark.system("sla")
@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("linear", ["marginal", "all"])
def test_it_is_sparse_attention_plus_a_layer_of_linear_attention(feature: str, linear: str) -> None:
    """Written out: which blocks each block of queries reads exactly, which linearly, from the means of tiles."""
    torch.manual_seed(0)
    net = One().double()
    x = torch.randn(1, 8, 8, 4, dtype=torch.float64)  # 32 places in 4 tiles of 8 x 4: all of them one tile
    patch, learned = Sla(critical=0.3, negligible=0.3, feature=feature, linear=linear, queries=8, keys=4).tunable(net)
    with patch, torch.no_grad():
        zero = net(x)
        layer = next(iter(learned.layers.values()))
        for p in layer.parameters():
            p.normal_()
        got = net(x)
    q, k, v = net.transformer_blocks[0].attn.parts(x.flatten(2).transpose(1, 2))
    phi = {"softmax": lambda y: y.softmax(-1), "elu": lambda y: torch.where(y > 0, y + 1, y.exp()), "relu": torch.relu}
    phi_q, phi_k = phi[feature](q), phi[feature](k)
    means = k.unflatten(2, (8, 4)).mean(3) - k.mean(2, keepdim=True)
    score = q.unflatten(2, (4, 8)).mean(3) @ means.transpose(2, 3)
    order = score.argsort(-1, descending=True)
    exact = reference(q, k, v, order[..., :2], (8, 4))  # 0.3 of 8 blocks are 2
    weights = phi_q @ phi_k.transpose(2, 3)
    if linear == "marginal":
        read = torch.zeros(1, 2, 4, 8, dtype=torch.bool).scatter(-1, order[..., 2:6], True)
        weights = weights * read.repeat_interleave(8, 2).repeat_interleave(4, 3)
    rough = weights @ v / (weights.sum(-1, keepdim=True) + LEAST)
    torch.testing.assert_close(zero, exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(got, exact + layer(rough), rtol=0, atol=1e-10)
    torch.testing.assert_close(net(x), attend(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.system("sla")
def test_all_blocks_critical_are_full_attention() -> None:
    torch.manual_seed(0)
    net = One().double()
    x = torch.randn(2, 8, 8, 4, dtype=torch.float64)
    want = net(x)
    assert torch.equal(_run(Sla(critical=1.0, negligible=0.0), net, x), want)
    almost = _run(Sla(critical=0.9, negligible=0.0, queries=16, keys=32), net, x)  # one block of keys: it is kept
    torch.testing.assert_close(almost, want, rtol=0, atol=1e-10)


def _run(method: Any, net: nn.Module, *args: Tensor) -> Tensor:
    patch = method.apply(net)
    try:
        return net(*args)
    finally:
        patch.remove()


@pytest.mark.system("sla")
def test_fine_tuning_wins_back_the_loss_at_ninety_percent_sparsity() -> None:
    """Of 64 tokens each block of 4 reads 6. The network and the layers learn together, on the loss that it was trained
    with; what is won back is told from further training by what the untouched network wins in as many steps."""
    net, loss = trained(), FlowMatching()
    full = held_out(loss, {"denoiser": net})
    settings = {"critical": 0.1, "negligible": 0.1, "queries": 4, "keys": 2}
    patch, learned = Sla(**settings).tunable(net.dit)
    with patch:
        sparse = held_out(loss, {"denoiser": net})
        both = Beside(net, learned)
        learn(loss, {"denoiser": both}, both.parameters(), 150, 1e-3)
        tuned = held_out(loss, {"denoiser": net})
    longer = trained()
    learn(loss, {"denoiser": longer}, longer.parameters(), 150, 1e-3)
    best = held_out(loss, {"denoiser": longer})
    assert sparse > 1.05 * full
    assert tuned < sparse - 0.8 * (sparse - best)


@pytest.mark.system("linear-attention")
def test_maps_that_were_taught_layer_by_layer_draw_digits_again() -> None:
    net, transfer = trained(), AttentionTransfer()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    softmax = distance(drawn(net))
    patch, learned = Linear().tunable(net.dit)
    with patch:
        raw, gap = distance(drawn(net)), held_out(transfer, {"denoiser": net, "learned": learned})
        learn(transfer, {"denoiser": net, "learned": learned}, learned.parameters(), 200, 2e-2)
        taught, left = distance(drawn(net)), held_out(transfer, {"denoiser": net, "learned": learned})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # the maps alone have learned
    assert left < 0.5 * gap
    assert taught - softmax < 0.5 * (raw - softmax)


def test_transfer_is_zero_where_the_approximation_is_exact_and_reaches_the_layers_alone() -> None:
    torch.manual_seed(0)
    net, transfer = One(), AttentionTransfer()
    batch = {"x0": torch.randn(2, 8, 8, 4)}

    class Timed(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return net(x)

    def loss(method: Any) -> tuple[Tensor, Learned]:
        patch, learned = method.tunable(net)
        with patch:
            return transfer.loss({"denoiser": Timed(), "learned": learned}, batch, torch.Generator()), learned

    exact, _ = loss(Sla(critical=0.9, negligible=0.0, queries=32, keys=32))
    assert float(exact.detach()) < 1e-10
    rough, learned = loss(Linear())
    rough.backward()
    assert float(rough.detach()) > 1e-3
    assert all(p.grad is not None and p.grad.any() for p in learned.parameters())
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="no approximate attention ran"):
        transfer.loss({"denoiser": Timed(), "learned": Learned("attention.sla")}, batch, torch.Generator())


@pytest.mark.parametrize("method", [Sla, Linear], ids=["sla", "linear"])
def test_layers_are_kept_and_read_again_in_a_recipe(method: Any, tmp_path: Path) -> None:
    """Bit for bit; a file of another method, and none, are refused in one line."""
    pipe, label = SD3.build(), method.label()
    settings = {"queries": 4, "keys": 4} if method is Sla else {}
    patch, learned = method(**settings).tunable(pipe.transformer)
    with patch, torch.no_grad():
        SD3.call(pipe)
        rng = torch.Generator().manual_seed(0)
        for p in learned.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
        want = SD3.call(pipe)
    file = tmp_path / "layers.safetensors"
    learned.write(file)
    with accelerate(pipe, Recipe.from_dict({"methods": [{label: settings | {"weights": str(file)}}]})):
        assert torch.equal(SD3.call(pipe), want)
    other = {"attention.sla", "attention.linear"} - {label}
    for name, message in ((other.pop(), "holds no layers of"), (label, "cannot be read")):
        given = file if message.startswith("holds") else tmp_path / "none"
        with pytest.raises((ValueError, Refused), match=message) as error:
            accelerate(pipe, Recipe.from_dict({"methods": [{name: {"weights": str(given)}}]}))
        assert "\n" not in str(error.value)


@pytest.mark.system("linear-attention")
def test_the_maps_of_hedgehog_are_positive_of_sum_one_and_tell_signs_apart() -> None:
    layer, rng = Hedgehog(3, 8), torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=rng) for _ in range(2))
    phi_q, phi_k = layer(q, k)
    for x, phi in ((q, phi_q), (k, phi_k)):
        assert phi.shape[-1] == 16
        torch.testing.assert_close(phi, torch.cat([x, -x], -1).mul(8**-0.25).softmax(-1))


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_an_attention_that_is_called_row_by_row_is_one_attention() -> None:
    """As Mochi's."""
    family = next(f for f in MORE if f.name == "mochi")
    pipe = family.build()
    patch, learned = Sla(queries=4, keys=4).tunable(pipe.transformer)
    with patch:
        family.call(pipe)
    assert len(learned.layers) == len(pipe.transformer.transformer_blocks)

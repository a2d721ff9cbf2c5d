import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers import WanTransformer3DModel as Wan
from torch import Tensor, nn
from torch._inductor import config as inductor

from hasten.kernels import int8_linear as int8
from hasten.method import Refused
from hasten.quant.w8a8 import W8A8, Int8Linear
from hasten.runtime.bf16 import BF16

pytestmark = pytest.mark.system("w8a8")

try:
    int8.backend(torch.device("cpu"))
except Refused:
    pytest.skip("this CPU has no fast int8", allow_module_level=True)

WIDTH = 128


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    """No pool of threads; and the variable that the first compilation sets for good is not blamed on a test."""
    with inductor.patch(compile_threads=1):
        torch.compile(torch.abs)(torch.ones(3))
        yield


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def awake(net: nn.Module) -> nn.Module:
    """Zero-initialised layers would hide what a block does."""
    torch.manual_seed(1)
    for p in net.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.05)
    return net.eval()


def sd3() -> nn.Module:
    torch.manual_seed(0)
    return awake(SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=WIDTH, pooled_projection_dim=16,
        pos_embed_max_size=16, qk_norm="rms_norm",
    ))  # fmt: skip


def call_sd3(net: nn.Module) -> Tensor:
    return net(randn(2, 4, 16, 16), randn(2, 7, 32), randn(2, 16), torch.full((2,), 500.0)).sample


def flux() -> nn.Module:
    torch.manual_seed(0)
    return awake(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(16, 24, 24),
    ))  # fmt: skip


def call_flux(net: nn.Module) -> Tensor:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return net(
        hidden_states=randn(1, 16, 16), timestep=torch.full((1,), 0.5), img_ids=ids, txt_ids=torch.zeros(7, 3),
        pooled_projections=randn(1, 16), encoder_hidden_states=randn(1, 7, 16),
    ).sample  # fmt: skip


def pixart() -> nn.Module:
    torch.manual_seed(0)
    return awake(PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=64, num_attention_heads=2, in_channels=4,
        out_channels=8, caption_channels=16, cross_attention_dim=WIDTH, norm_type="ada_norm_single",
    ))  # fmt: skip


def call_pixart(net: nn.Module) -> Tensor:
    none = {"resolution": None, "aspect_ratio": None}
    return net(randn(1, 4, 16, 16), randn(1, 7, 16), timestep=torch.full((1,), 500), added_cond_kwargs=none).sample


def wan() -> nn.Module:
    torch.manual_seed(0)
    return awake(Wan(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=256, num_layers=2, rope_max_seq_len=32,
    ))  # fmt: skip


def call_wan(net: nn.Module) -> Tensor:
    return net(randn(1, 4, 3, 8, 8), torch.full((1,), 500), randn(1, 7, 16)).sample


def unet() -> nn.Module:
    torch.manual_seed(0)
    return awake(UNet2DConditionModel(
        sample_size=16, block_out_channels=(WIDTH, WIDTH), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 2),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
    ))  # fmt: skip


def call_unet(net: nn.Module) -> Tensor:
    return net(randn(1, 4, 16, 16), 500, encoder_hidden_states=randn(1, 7, WIDTH)).sample


FAMILIES = {f.__name__: (f, c) for f, c in [
    (sd3, call_sd3), (flux, call_flux), (pixart, call_pixart), (wan, call_wan), (unet, call_unet)
]}  # fmt: skip


def run(call: Callable[[nn.Module], Tensor], net: nn.Module) -> Tensor:
    with torch.no_grad():
        return call(net)


def swapped(net: nn.Module) -> set[str]:
    return {n for n, m in net.named_modules() if isinstance(m, Int8Linear)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_close_and_is_restored_bit_for_bit(name: str):
    build, call = FAMILIES[name]
    net = build()
    modules, state = dict(net.named_modules()), {k: v.clone() for k, v in net.state_dict().items()}
    before = run(call, net)
    patch = W8A8(smallest=WIDTH).apply(net)
    assert len(swapped(net)) == len(patch.sites) >= 10
    after = run(call, net)
    assert not after.equal(before)
    assert F.cosine_similarity(after.flatten(), before.flatten(), 0) > 0.999
    patch.remove()
    assert dict(net.named_modules()) == modules  # the very objects
    assert all(net.state_dict()[k].equal(v) for k, v in state.items())
    assert run(call, net).equal(before)


def test_layers_that_see_vectors_stay():
    for build, _ in FAMILIES.values():
        net = build()
        with W8A8(smallest=1).apply(net):
            assert not any("norm" in n or "time_emb" in n for n in swapped(net))
            inside = {n for n, m in net.named_modules() if type(m) is nn.Linear and "blocks." in n}
            assert all("norm" in n or "emb" in n for n in inside)


def test_small_layers_stay_and_none_large_enough_is_refused():
    net = sd3()
    with W8A8(smallest=WIDTH).apply(net):
        assert swapped(net)
    before = dict(net.named_modules())
    with pytest.raises(Refused, match=r"no linear layer of 1024 features.*lower `smallest`"):
        W8A8(smallest=1024).apply(net)
    assert dict(net.named_modules()) == before


def test_weights_of_the_swapped_layers_take_half_the_bytes_of_bfloat16():
    net = sd3()
    dense = {n: m.weight.numel() for n, m in net.named_modules() if type(m) is nn.Linear}
    with W8A8(smallest=WIDTH).apply(net):
        for name in swapped(net):
            layer = net.get_submodule(name)
            own = sum(b.nbytes for b in layer.buffers())
            assert own == dense[name] + 4 * layer.out_features
            assert [n for n, _ in layer.named_parameters()] == ["bias"]


def test_with_bf16_outputs_are_bf16_inside_and_both_are_taken_back():
    net = sd3()
    before = run(call_sd3, net)
    narrow = BF16().apply(net)
    patch = W8A8(smallest=WIDTH).apply(net)
    layer = net.transformer_blocks[0].ff.net[2]
    with torch.no_grad():
        assert layer(randn(2, 5, layer.in_features).bfloat16()).dtype == torch.bfloat16
    after = run(call_sd3, net)
    assert after.dtype == torch.float32
    assert F.cosine_similarity(after.flatten(), before.flatten(), 0) > 0.999
    patch.remove()
    narrow.remove()
    assert run(call_sd3, net).equal(before)


def test_compiled_blocks_have_one_graph_and_the_same_numbers():
    linears = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    net = nn.Sequential(*(Int8Linear(m) if isinstance(m, nn.Linear) else m for m in linears))
    x = randn(3, 50, WIDTH)
    torch._dynamo.reset()
    with torch.no_grad():
        got, expected = torch.compile(net, fullgraph=True)(x), net(x)
    # gelu of the compiler and of eager differ by an ulp, which can move a rounding by one step
    assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_a_copy_a_pickle_and_a_state_give_the_same_numbers():
    layer, x = Int8Linear(nn.Linear(WIDTH, 96)), randn(5, WIDTH)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = Int8Linear(nn.Linear(WIDTH, 96))
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), other):
            assert twin(x).equal(layer(x))


def test_a_cast_of_the_network_leaves_the_int8_numbers():
    layer, x = Int8Linear(nn.Linear(WIDTH, 96)), randn(5, WIDTH)
    scale = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.scale.equal(scale)
    assert layer.bias.dtype == torch.bfloat16
    with torch.no_grad():
        assert layer(x).dtype == torch.float32


def test_a_refused_device_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    net = sd3()
    before = dict(net.named_modules())
    monkeypatch.setattr(int8, "cpu_features", lambda: {"avx2": True})
    with pytest.raises(Refused, match="need a CPU with one of avx512_vnni"):
        W8A8(smallest=WIDTH).apply(net)
    assert dict(net.named_modules()) == before


def test_settings_have_ranges():
    assert W8A8.label() == "quant.w8a8"
    for bad in ({"smallest": 0}, {"activations": "channel"}, {"bits": 4}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            W8A8(**bad)

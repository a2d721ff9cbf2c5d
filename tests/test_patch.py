"""Surgery is exact: removal gives back the same objects and the same bits, or refuses and changes nothing."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.patch import Patch


class Net(nn.Module):
    """A chain with something of every kind: tied weights, a buffer, a child of a child."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.body[0].weight  # type: ignore[assignment]
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.shift


def looks(net: nn.Module) -> dict[str, Any]:
    """Everything that an edit could leave behind."""
    seen: dict[str, Any] = {}
    for name, m in net.named_modules():
        plain = {k: v for k, v in vars(m).items() if isinstance(v, int | str)}
        seen[name] = (id(m), type(m), list(vars(m)), plain, list(m._modules))
    for name, t in [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]:
        seen[f"{name}.data"] = (id(t), t.dtype, t.shape, t.stride(), t.requires_grad, bits(t))
    return seen


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def patched(edit: str, net: Net, patch: Patch) -> None:
    """One edit of each kind."""
    match edit:
        case "set new":
            patch.set(net.head, "note", "kept")
        case "set old":
            patch.set(net.head, "in_features", 5)
        case "set a tensor":
            patch.set(net, "extra", torch.ones(2))
        case "wrap":
            patch.wrap(net.body[0], lambda forward, x: forward(x) + 1)
        case "swap":
            patch.swap(net, "body.1.0", nn.Linear(4, 4))
        case "extend":
            patch.extend(net, {"forward": lambda self, x: x * 0})
        case "park":
            patch.park(list(net.parameters()), torch.bfloat16)


EDITS = ["set new", "set old", "set a tensor", "wrap", "swap", "extend", "park"]


@pytest.mark.parametrize("edit", EDITS)
def test_removal_is_exact(edit: str) -> None:
    net, x = Net(), torch.randn(3, 4)
    before, seen = net(x), looks(net)
    with Patch() as patch:
        patched(edit, net, patch)
        kept = patch.keep()
    assert looks(net) != seen
    assert kept.sites
    kept.remove()
    assert looks(net) == seen
    assert torch.equal(net(x), before)
    kept.remove()  # a second time is nothing
    assert looks(net) == seen


@pytest.mark.parametrize("edit", EDITS)
def test_an_exception_half_way_takes_back_what_was_done(edit: str) -> None:
    net = Net()
    seen = looks(net)

    def apply() -> None:
        with Patch() as patch:
            patched("wrap", net, patch)
            patched(edit, net, patch)
            raise KeyError

    with pytest.raises(KeyError):
        apply()
    assert looks(net) == seen


@pytest.mark.parametrize("edit", EDITS)
def test_without_keep_the_block_ends_as_it_began(edit: str) -> None:
    net = Net()
    seen = looks(net)
    with Patch() as patch:
        patched(edit, net, patch)
        assert looks(net) != seen
    assert looks(net) == seen


@pytest.mark.parametrize("edit", EDITS)
def test_out_of_order_removal_is_refused_and_changes_nothing(edit: str) -> None:
    net, x = Net(), torch.randn(3, 4)
    seen = looks(net)
    first, second = Patch(), Patch()
    if edit == "set a tensor":
        first.set(net, "extra", torch.ones(2))
        second.set(net, "extra", torch.ones(2))
    elif edit == "park":
        first.park(list(net.parameters()), torch.float16)
        second.park([net.head.weight], torch.float64)
    else:
        patched("wrap", net, first)  # the first has edits that could be undone, and must not be
        patched(edit, net, first)
        patched(edit, net, second)
        if edit == "set old":
            second.set(net.head, "in_features", 6)
        if edit == "set new":
            second.set(net.head, "note", "newer")
    during = looks(net)
    with pytest.raises(RuntimeError, match="remove that one first"):
        first.remove()
    assert looks(net) == during
    second.remove()
    first.remove()
    assert looks(net) == seen
    assert net(x).shape == x.shape


def test_edits_of_one_place_are_undone_newest_first() -> None:
    net = Net()
    seen = looks(net)
    order: list[int] = []

    def note(n: int) -> Any:
        return lambda forward, x: (order.append(n), forward(x))[1]

    patch = Patch()
    for n in range(3):
        patch.wrap(net.head, note(n))
    net(torch.zeros(1, 4))
    assert order == [2, 1, 0]  # the newest is outermost
    patch.remove()
    assert looks(net) == seen


def test_check_of_several_sees_what_they_hold_together() -> None:
    """Patches of one handle are undone together, so one may stand on another; a stranger's edit on top is refused."""
    net = Net()
    below, above, stranger = Patch(), Patch(), Patch()
    below.wrap(net, lambda forward, x: forward(x))
    above.wrap(net, lambda forward, x: forward(x))
    with pytest.raises(RuntimeError):
        Patch.check([below])
    Patch.check([below, above])
    stranger.wrap(net, lambda forward, x: forward(x))
    with pytest.raises(RuntimeError):
        Patch.check([below, above])
    for patch in (stranger, above, below):
        patch.remove()
    assert "forward" not in vars(net)


def test_extend_touches_one_object_of_its_class() -> None:
    one, other = Net(), Net()
    plain, x = type(one), torch.randn(2, 4)
    want = other(x)
    with Patch() as patch:
        patch.extend(one, {"forward": lambda self, x: x * 0})
        assert type(one) is not plain
        assert isinstance(one, plain)
        assert (type(one).__name__, type(one).__module__) == (plain.__name__, plain.__module__)
        assert torch.equal(one(x), x * 0)
        assert torch.equal(other(x), want)
    assert type(one) is plain


ODD: dict[str, Tensor] = {
    "plain": torch.randn(3, 5),
    "transposed": torch.randn(5, 3).T,
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "with gaps": torch.randn(6, 6)[::2, 1::2],
    "expanded": torch.randn(3, 1).expand(3, 4),
    "a slice from the middle": torch.randn(20)[5:9],
    "no dimension": torch.tensor(2.71828),
    "no element": torch.empty(0, 4),
    "one element": torch.randn(1),
    "fp16": torch.randn(4, 4).half(),
    "not finite": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
}


@pytest.mark.parametrize("tensor", ODD.values(), ids=ODD)
def test_parked_tensors_come_back_to_the_bit(tensor: Tensor) -> None:
    p = nn.Parameter(tensor, requires_grad=False)
    stride, before = p.stride(), bits(p)
    patch = Patch()
    patch.park([p], torch.bfloat16)
    assert p.dtype == torch.bfloat16
    assert p.shape == tensor.shape
    assert torch.equal(p.nan_to_num(), tensor.to(torch.bfloat16).nan_to_num())
    patch.remove()
    assert (p.dtype, p.shape, bits(p)) == (tensor.dtype, tensor.shape, before)
    assert p.stride() == stride


def test_a_parked_tensor_may_be_moved_meanwhile() -> None:
    """As by `pipe.to(...)`: other memory, the same numbers. That is no later patch, and removal still works."""
    net = Net()
    before = bits(net.head.weight)
    patch = Patch()
    patch.park(list(net.parameters()), torch.bfloat16)
    for p in net.parameters():
        p.data = p.data.clone()
    patch.remove()
    assert bits(net.head.weight) == before


def test_many_parked_tensors_do_not_mix() -> None:
    parameters = [nn.Parameter(torch.randn(n, 3, generator=torch.Generator().manual_seed(n))) for n in range(1, 9)]
    before = [bits(p) for p in parameters]
    patch = Patch()
    patch.park(parameters, torch.bfloat16)
    patch.remove()
    assert [bits(p) for p in parameters] == before
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    assert all(a.data_ptr() + a.nbytes <= b.data_ptr() or b.data_ptr() < a.data_ptr() for a, b in pairwise(parameters))


def test_one_parameter_listed_twice() -> None:
    """Tied weights: one object under two names. It is parked, and comes back, as one, with its first numbers."""
    p = nn.Parameter(torch.randn(4, 4))
    before = bits(p)
    patch = Patch()
    patch.park([p, p], torch.bfloat16)
    patch.remove()
    assert p.dtype == torch.float32
    assert bits(p) == before


def test_a_parked_network_keeps_its_ties_and_what_points_at_its_weights() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    held = optimizer.param_groups[0]["params"][0]
    with Patch() as patch:
        patch.park(list(net.parameters()), torch.bfloat16)
        assert net.head.weight is net.body[0].weight is held
        assert held.dtype == torch.bfloat16
    assert net.head.weight is net.body[0].weight is held
    assert held.dtype == torch.float32


def test_swap_of_an_unknown_name_changes_nothing() -> None:
    net = Net()
    seen = looks(net)
    with pytest.raises((AttributeError, KeyError)), Patch() as patch:
        patch.swap(net, "body.7.0", nn.Linear(4, 4))
    with pytest.raises((AttributeError, KeyError)), Patch() as patch:
        patch.swap(net, "nowhere", nn.Linear(4, 4))
    assert looks(net) == seen


def test_keep_hands_over_edits_counts_and_checks() -> None:
    net = Net()
    with Patch() as patch:
        patch.wrap(net.head, lambda forward, x: forward(x))
        patch.tally["ran"] += 2
        kept = patch.keep()
        patch.tally["ran"] += 1  # closures made before still write to the one tally
    assert kept.sites == ["Linear"]
    assert kept.tally["ran"] == 3
    net.head.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="'forward' of Linear"):
        kept.remove()
    del net.head.forward
    with pytest.raises(RuntimeError):
        kept.remove()


def test_after_runs_once_the_method_has_returned_and_keeps_its_signature() -> None:
    class Clerk:
        def add(self, a: int, *, b: int = 2) -> int:
            seen.append("inside")
            return a + b

    seen: list[str] = []
    clerk = Clerk()
    with Patch() as patch:
        patch.after(clerk, "add", lambda: seen.append("after"))
        assert clerk.add(1, b=3) == 4
        assert seen == ["inside", "after"]
        assert list(inspect.signature(clerk.add).parameters) == ["a", "b"]
    assert "add" not in vars(clerk)

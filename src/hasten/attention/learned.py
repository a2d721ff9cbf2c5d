"""Small layers that an approximate attention is fine-tuned with, one for each attention of a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from hasten import labelled
from hasten.attention.words import Compute
from hasten.picture import Call
from hasten.places import Places


class Learned(nn.Module):
    """Layers by the dotted name of the attention that they belong to. Those of a network that is to be tuned come into
    being at its first call, which must be before the optimizer is made.

    Attributes:
        label: of the method that they are for.
        make: (heads, channels) -> a new layer, that changes nothing or little; None where none may be made.
        gaps: where it is a list, attention runs as softmax, and what the approximation is off goes there instead: mean
            square over that of the softmax's output, with gradients to these layers alone.
    """

    def __init__(self, label: str, make: Callable[[int, int], nn.Module] | None = None) -> None:
        super().__init__()
        self.label, self.make = label, make
        self.layers = nn.ModuleDict()
        self.gaps: list[Tensor] | None = None

    def of(self, name: str, q_BHNC: Tensor) -> nn.Module | None:
        """The layer of an attention that was called with such queries; None where it has none."""
        key = name.replace(".", "|")  # a ModuleDict's names have no dots
        if key not in self.layers and self.make is not None:
            self.layers[key] = self.make(q_BHNC.shape[1], q_BHNC.shape[3]).to(q_BHNC)
        return self.layers[key] if key in self.layers else None  # noqa: SIM401

    def told(self, compute: Compute) -> Compute:
        """`compute`, or while `gaps` is a list, how far it is from softmax attention."""

        def run(places: Places, names: tuple[str, ...], call: Call) -> Tensor:
            if self.gaps is None:
                return compute(places, names, call)
            exact = call.run().detach()
            alone = replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach())
            off = compute(places, names, alone) - exact
            self.gaps.append(off.float().square().mean() / exact.float().square().mean())
            return exact

        return run

    def write(self, file: str | os.PathLike[str]) -> None:
        """One safetensors file, whole or not at all."""
        labelled.write(file, self.label, self.layers.state_dict())

    @classmethod
    def read(cls, file: str | os.PathLike[str], label: str, make: Callable[[dict[str, Tensor]], nn.Module]) -> Learned:
        """What `write` wrote, for inference.

        Args:
            make: the state of one layer -> the layer.

        Raises:
            ValueError: in one line, where there is no such file or it is for another method.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in labelled.read(file, label, "layers", f"tuning {label}")[0].items():
            name, _, part = key.rpartition(".")
            states.setdefault(name, {})[part] = tensor
        learned = cls(label)
        for name, state in states.items():
            layer = make(state)
            layer.load_state_dict(state)
            learned.layers[name] = layer.requires_grad_(False)
        return learned

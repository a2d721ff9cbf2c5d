"""A linear layer of 4-bit weights and 8-bit activations: packed weights are widened to int8, and multiply there.

Letters of shapes: M tokens, I input and O output features, G groups of a row, B bytes of a packed row. A weight is
u_O1 times_OG q_OI: its group's multiple is whole, so times q is an 8-bit integer, and the product is that of
`int8_linear`, exact in int32. Lin et al. 2024, QServe, arXiv:2405.04532 section 4.1 (there with a zero point).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.format import Codes, multiples
from hasten.kernels.int8_linear import Activations, fused, int8_linear, pack
from hasten.kernels.packed import stored, unpack_bits


@dataclass(frozen=True)
class Int4:
    """Weights of a layer.

    Attributes:
        packed: [O, B] uint8, two codes + 7 a byte.
        times: [O, G] int8.
        unit: [O, 1] float32.
        inputs: I.
        share: inputs of a group.
    """

    packed: Tensor
    times: Tensor
    unit: Tensor
    inputs: int
    share: int

    @classmethod
    def of(cls, q: Codes) -> Int4:
        """From codes whose scales are whole multiples.

        Raises:
            ValueError: they are of another format.
        """
        if q.format.element != "int4" or q.format.scales != "whole" or isinstance(q.format.share, str):
            raise ValueError(f"int4 weights are groups of int4 with whole multiples as scales, not {q.format}")
        unit = q.scale.amax(-2) / multiples(q.format)
        times = torch.round(q.scale.squeeze(-1) / unit).to(torch.int8)
        return cls(stored(q), times, unit, q.codes.shape[-1], q.format.share)

    def wide(self) -> Tensor:
        """[O, I] int8: multiple times code."""
        return fused(widened, self.packed.device.type)(self.packed, self.times, self.inputs, self.share)


def widened(packed: Tensor, times: Tensor, inputs: int, share: int) -> Tensor:
    """What `Int4.wide` gives, as plain operators."""
    codes = unpack_bits(packed, 4, inputs).to(torch.int8) - 7
    return codes * times.repeat_interleave(share, 1)[:, :inputs]


def int4_linear(x: Tensor, w: Int4, bias_O: Tensor | None = None, activations: Activations = "token") -> Tensor:
    """x [..., I] times the weights, plus bias: [..., O] in the precision of `x`; equal to `int8_linear` of the widened
    weights, bit for bit.

    Raises:
        Refused: a gradient is asked for, or the device has no 8-bit arithmetic.
    """
    return int8_linear(x, pack(w.wide()), w.unit, bias_O, activations)

"""Weights rounded one input after the other, each error made good by the inputs that are still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.format import Codes, Format, dequantize, encode, scales


def hessian(x_MI: Tensor) -> Tensor:
    """[I, I] float64: X^T X of a layer's inputs, half the second derivative of its squared error."""
    x = x_MI.double()
    return x.T @ x


def gptq(w_OI: Tensor, hessian_II: Tensor, format: Format, damp: float = 0.01) -> Codes:
    """Codes of w whose outputs err least on inputs of this Hessian: after input i is rounded, the others still to come
    move by -e_i / C_ii C_i,i+1.. with C the upper Cholesky factor of the inverse Hessian (Frantar et al. 2022,
    arXiv:2210.17323 alg. 1). A group's scale is that of its weights as they are when its turn comes.

    Args:
        damp: of the Hessian's mean diagonal, added to its diagonal. Inputs that are never seen weigh nothing: their
            weights are rounded as they are.

    Raises:
        ValueError: the Hessian is not finite.
    """
    if not bool(torch.isfinite(hessian_II).all()):
        raise ValueError("the layer's inputs are not finite: nothing can be fitted to them")
    w, h, inputs = w_OI.double().clone(), hessian_II.double().clone(), w_OI.shape[1]
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += damp * diagonal.mean()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    size = inputs if isinstance(format.share, str) else format.share
    whole = format.sharing("row") if format.share != "tensor" else format
    parts: list[Codes] = []
    shared = scales(w, format) if format.share == "tensor" or format.scales in ("e4m3", "whole") else None
    for begin in range(0, inputs, size):
        group = slice(begin, min(begin + size, inputs))
        if shared is None:
            scale, zero = scales(w[:, group], whole)
        elif format.share == "tensor":
            scale, zero = shared
        else:
            scale, zero = shared[0][:, begin // size : begin // size + 1], None
        columns = []
        for i in range(group.start, group.stop):
            code = encode(w[:, i : i + 1], whole, scale, zero)
            error = (w[:, i : i + 1] - dequantize(code).double()) / upper[i, i]
            w[:, i + 1 :] -= error * upper[i, i + 1 :]
            columns.append(code.codes)
        parts.append(Codes(whole, torch.cat(columns, 1), scale, zero))
    if format.share == "tensor":
        return Codes(format, torch.cat([p.codes for p in parts], 1), parts[0].scale, parts[0].zero)
    zeros = None if parts[0].zero is None else torch.cat([p.zero for p in parts if p.zero is not None], 1)
    return Codes(format, torch.cat([p.codes for p in parts], 1), torch.cat([p.scale for p in parts], 1), zeros)

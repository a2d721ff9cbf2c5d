"""How near a picture stays to the one that the untouched pipeline makes from the same prompt and seed."""

from __future__ import annotations

from torch import Tensor

systems: tuple[str, ...] = ()


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B], of pictures [B, C, H, W] in [0, 1]: -10 log10 of the mean squared error at
    peak 1. Equal pictures have infinity. Huynh-Thu & Ghanbari 2008.

    Raises:
        ValueError: the shapes differ or the pictures are not floats (uint8 pictures would have another peak).
    """
    if a_BCHW.shape != b_BCHW.shape or not (a_BCHW.is_floating_point() and b_BCHW.is_floating_point()):
        given = f"{a_BCHW.dtype} {list(a_BCHW.shape)} and {b_BCHW.dtype} {list(b_BCHW.shape)}"
        raise ValueError(f"expected two float tensors of pictures in [0, 1] and of one shape, got {given}")
    error = (a_BCHW.double() - b_BCHW.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def feature_distance(fa_BD: Tensor, fb_BD: Tensor) -> Tensor:
    """Distance of features, pair by pair, [B]: 1 - cosine, in [0, 2]. 0: the same direction; 1: orthogonal.

    The length of a feature (how strongly it fires) is left out on purpose: contrast changes it, what is shown does not.
    A feature of length 0 is at distance 1 from all others; a non-finite one is at NaN.

    Raises:
        ValueError: the shapes differ, or are not [B, D].
    """
    if fa_BD.ndim != 2 or fa_BD.shape != fb_BD.shape:
        raise ValueError(f"expected two sets of features [B, D], got {list(fa_BD.shape)} and {list(fb_BD.shape)}")
    return (1 - (_directions(fa_BD) * _directions(fb_BD)).sum(1)).clamp(0, 2)


def feature_distances(fa_ND: Tensor, fb_MD: Tensor) -> Tensor:
    """`feature_distance` of every feature of one set [N, D] to every one of the other [M, D]: [N, M].

    Raises:
        ValueError: not [N, D] and [M, D].
    """
    if fa_ND.ndim != 2 or fb_MD.ndim != 2 or fa_ND.shape[1] != fb_MD.shape[1]:
        raise ValueError(f"expected features [N, D] and [M, D], got {list(fa_ND.shape)} and {list(fb_MD.shape)}")
    return (1 - _directions(fa_ND) @ _directions(fb_MD).mT).clamp(0, 2)


def _directions(f_BD: Tensor) -> Tensor:
    f = f_BD.detach().double()
    length = f.norm(dim=1, keepdim=True)
    return f / length.where(length != 0, 1)

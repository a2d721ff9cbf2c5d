"""FLOPs follow the formulas."""

import torch
import torch.nn.functional as F
from torch import nn

from hasten.measure.flops import count


def test_a_linear_layer_and_a_convolution():
    linear, x = nn.Linear(30, 50), torch.randn(7, 30)
    assert count(lambda: linear(x)) == 2 * 7 * 30 * 50
    convolution, y = nn.Conv2d(3, 8, 5, padding=2), torch.randn(2, 3, 16, 16)
    assert count(lambda: convolution(y)) == 2 * 2 * 16 * 16 * 3 * 8 * 25


def test_attention():
    q, k = torch.randn(2, 4, 10, 8), torch.randn(2, 4, 12, 8)
    expected = 2 * (2 * 2 * 4 * 10 * 12 * 8)  # scores, then values
    with torch.no_grad():
        assert count(lambda: F.scaled_dot_product_attention(q, k, k)) == expected
        assert count(lambda: (q @ k.mT).softmax(-1) @ k) == expected
        mask = torch.ones(10, 12, dtype=torch.bool)
        assert count(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask)) == expected
    assert count(lambda: F.scaled_dot_product_attention(q.requires_grad_(), k, k)) == expected


def test_calls_add_up_and_elementwise_work_is_free():
    linear, x = nn.Linear(16, 16), torch.randn(4, 16)

    def steps(n):
        y = x
        for _ in range(n):
            y = torch.sin(linear(y)) + 1

    assert count(lambda: steps(5)) == 5 * count(lambda: steps(1)) > 0
    assert count(lambda: torch.sin(x) + 1) == 0


def test_integer_products_are_not_seen():
    a, b = torch.ones(32, 64, dtype=torch.int8), torch.ones(64, 16, dtype=torch.int8)
    assert count(lambda: torch._int_mm(a, b)) == 0

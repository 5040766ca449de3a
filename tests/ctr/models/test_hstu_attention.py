"""The attention of HSTU over jagged rows against dense matrices, row by row."""

import torch
import torch.nn.functional as F

from tessera.ctr.models.hstu_attention import HSTUAttention, hstu_mask


def dense(q, k, v, mask, alpha, divisor):
    a = F.silu(torch.einsum("ihd,jhd->hij", q, k) * alpha) / divisor * mask
    return torch.einsum("hij,jhd->ihd", a, v)


def test_hstu_attention_with_several_targets_is_the_dense_one():
    """Lengths 0 to the longest, three targets each, which do not see each other; logits and gradients."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 6, 5 + 30, 9, 5])  # prefix 2 and targets 3 among them
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(int(offsets[-1]), 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = HSTUAttention(offsets, 2, 3, 40, 40.0)(q, k, v, 0.7)
    expected = []
    for first, n in zip(offsets.tolist(), lengths.tolist(), strict=False):
        mask = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                targets = i >= n - 3 and j >= n - 3
                mask[i, j] = (j <= i and not (targets and i != j)) or (i < 2 and j < 2)
        assert torch.equal(hstu_mask(torch.tensor([n]), 2, 3, n)[0], mask.bool())
        here = slice(first, first + n)
        expected.append(dense(q[here], k[here], v[here], mask, 0.7, 40.0))
    torch.testing.assert_close(out, torch.cat(expected))
    weight = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad((out * weight).sum(), [q, k, v]),
        torch.autograd.grad((torch.cat(expected) * weight).sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    # A target more, or one less, changes nothing of the others.
    few = [i for i in range(int(offsets[-1])) if i + 1 not in offsets]
    fewer = HSTUAttention(offsets - torch.arange(6), 2, 2, 40, 40.0)(q[few], k[few], v[few], 0.7)
    torch.testing.assert_close(fewer, out[few])

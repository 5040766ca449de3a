"""The attention of HSTU over jagged rows against dense matrices, row by row."""

import pytest
import torch
import torch.nn.functional as F

import tessera.ctr.models.hstu as hstu_module
from tessera.ctr.models.hstu_attention import HSTUAttention, _add, _scores, hstu_mask
from tests.ctr.models.test_sequence_models import LENGTHS, inputs, tower_of


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


def test_what_comes_later_changes_nothing_of_earlier_events():
    """Rows with an event more at their end: the tokens before it, of prefix and events, see what they saw."""
    torch.manual_seed(1)
    lengths, prefix = torch.tensor([2, 3, 9, 20]), 2  # no targets: what follows an event is an event
    longer = lengths + 1
    short, long = (torch.tensor([0, *one]).cumsum(0) for one in (lengths, longer))
    q, k, v = (torch.randn(int(long[-1]), 2, 3, dtype=torch.float64) for _ in range(3))
    kept = [i for i in range(int(long[-1])) if i + 1 not in long]
    found = HSTUAttention(long, prefix, 0, 32, 32.0)(q, k, v, 0.7)[kept]
    torch.testing.assert_close(found, HSTUAttention(short, prefix, 0, 32, 32.0)(q[kept], k[kept], v[kept], 0.7))


class SoftmaxAttention(HSTUAttention):
    """The same rectangles and masks with a softmax over what a token sees, in the place of SiLU and the divisor."""

    def __call__(self, q, k, v, alpha):
        out = torch.zeros_like(v)
        for index, mask in self.pieces:
            q_rhld, k_rhld, v_rhld = (one[index].transpose(1, 2) for one in (q, k, v))
            seen = mask.unsqueeze(1)
            scores = _scores(q_rhld, k_rhld, alpha).masked_fill(~seen, -1e9)
            _add(out, index, mask, torch.matmul(torch.softmax(scores, 3) * seen, v_rhld))
        return out


class TorchsAttention(HSTUAttention):
    """Torch's attention, row by row, with a mask that is written down here."""

    def __init__(self, offsets, prefix, targets, longest, divisor):
        self.offsets, self.prefix, self.targets = offsets.tolist(), prefix, targets

    def __call__(self, q, k, v, alpha):
        out = []
        for first, last in zip(self.offsets, self.offsets[1:], strict=False):
            n = last - first
            sees = torch.ones(n, n).tril().bool()
            sees[: self.prefix, : self.prefix] = True
            of_targets = slice(n - self.targets, n)
            sees[of_targets, of_targets] = torch.eye(self.targets).bool()
            parts = (one[first:last].transpose(0, 1)[None] for one in (q, k, v))
            out.append(F.scaled_dot_product_attention(*parts, attn_mask=sees, scale=alpha)[0].transpose(0, 1))
        return torch.cat(out)


@pytest.mark.parametrize("changes", [{}, {"form": "research", "layers": 1}])
def test_with_a_softmax_it_is_torchs_attention(monkeypatch, changes):
    """Logits and gradients of the whole model, and of several candidates of a row; it is not the model with SiLU."""
    tower = tower_of("hstu", **changes)
    given = inputs(tower)
    numeric, embeddings, events = given
    candidates = torch.randn(len(LENGTHS), 3, *embeddings["v"].shape[1:], dtype=torch.float64)
    found = {}
    for kind in (HSTUAttention, SoftmaxAttention, TorchsAttention):
        monkeypatch.setattr(hstu_module, "HSTUAttention", kind)
        logits = tower(*given)
        gradients = torch.autograd.grad(logits.square().sum(), [*tower.parameters(), embeddings["v"]])
        found[kind] = [logits, tower.of_candidates(numeric, embeddings, events, candidates), *gradients]
    for one, other in zip(found[SoftmaxAttention], found[TorchsAttention], strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(found[HSTUAttention][0], found[SoftmaxAttention][0], rtol=1e-3)

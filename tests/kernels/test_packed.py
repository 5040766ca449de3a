"""Packed rows: the fused step against unfused ops, learned scales against autograd of a dense definition."""

import itertools
import math

import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.formats import FORMATS, code_range, is_int
from tessera.kernels.layout import packed_layout
from tessera.kernels.optimizers import OPTIMIZERS, OptimizerSettings
from tessera.kernels.packed import BatchRows, packed_fake_quantise, packed_gather, packed_learn_scales, packed_update
from tessera.kernels.quantise import dequantise, quantise
from tessera.kernels.random import stream
from tessera.kernels.reference.packed import Parts
from tessera.kernels.update import update
from tests.kernels.tables import some_rows

ROWS, CHUNK, LR, STREAM = 24, 8, 0.05, stream(1, 2, 3)
SETTINGS = OptimizerSettings(LR, 0.01, 1e-8, 0.8, 0.95, 1.0, 0.01, 0.02)
INTS = ("int8", "int4", "int2")
needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
LAYOUTS = [
    *(packed_layout(format, 5, optimizer) for format, optimizer in itertools.product(FORMATS, OPTIMIZERS)),
    *(packed_layout(format, 16, "rowwise_adagrad") for format in FORMATS),
    *(packed_layout(format, 6, "adam", state_format="bf16") for format in FORMATS),
]
LEARNED = [packed_layout(f, d, o, learned=True) for f, d, o in itertools.product(INTS, (3, 16, 33), OPTIMIZERS[:4])]
LEARNED.append(packed_layout("int4", 8, "adam", learned=True, state_format="bf16"))


def some_of(layouts):
    """A third of the layouts, of all formats and optimizers; the others are slow tests."""
    return [one if place % 3 == 0 else pytest.param(one, marks=pytest.mark.slow) for place, one in enumerate(layouts)]


def packed_table(layout, rows=ROWS, chunk=CHUNK, scale=1.0):
    """Chunks of packed rows with random values, positive state and scales of about 0.1."""
    generator = torch.Generator().manual_seed(layout.dim)
    n = -(-rows // chunk) * chunk
    parts = Parts(torch.zeros((n, layout.bytes), dtype=torch.uint8), layout)
    parts.scales = torch.rand(n, generator=generator) * 0.1 + 0.05 if is_int(layout.format) else None
    values = torch.randn((n, layout.dim), generator=generator) * 0.3 * scale
    parts.codes = quantise(values, parts.scales, layout.format, rounding="nearest")
    parts.state = torch.rand(parts.state.shape, generator=generator).bfloat16().float()
    parts.scale_state = torch.rand(parts.scale_state.shape, generator=generator)
    if layout.optimizer == "adam":
        parts.state[:, -1] = torch.arange(n) % 5
    if layout.optimizer == "adam" and layout.learned:  # a count of its own
        parts.scale_state[:, -1] = torch.arange(n) % 3
    return [part.clone() for part in parts.bytes(layout).split(chunk)]


def batch(layout, seed=0, distinct=12, n=40, rows=ROWS):
    """(rows [u] with -1 in it, their ids, inverse [n]), gradients [n, dim]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = some_rows(distinct, rows, seed=seed, missing=0.1, distinct=True)
    inverse = torch.cat([torch.arange(distinct), torch.randint(0, distinct, (n - distinct,), generator=generator)])
    grads = torch.randn((n, layout.dim), generator=generator)
    return BatchRows(chosen, chosen * 7919 - 3, inverse[torch.randperm(n, generator=generator)]), grads


def parts_of(chunks, layout):
    return Parts(torch.cat(list(chunks)), layout)


@pytest.mark.parametrize("layout", LAYOUTS + LEARNED, ids=str)
def test_rows_have_the_documented_bytes(layout):
    per_value = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}[layout.format]
    state = {"sgd": 0, "adagrad": layout.dim, "rowwise_adagrad": 1, "adam": 2 * layout.dim + 1, "ftrl": 2 * layout.dim}
    expected = 4 * is_int(layout.format) + math.ceil(layout.dim * per_value / 8)
    expected += 4 * state[layout.optimizer] if not layout.moments else 4 * layout.dim + 4
    if layout.learned:
        expected += 4 * {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 3}[layout.optimizer]
    assert expected <= layout.bytes < expected + 4 and layout.bytes % 4 == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gather_dequantises(backend, layout):
    chunks, rows = packed_table(layout), some_rows(30, ROWS)
    parts = parts_of(chunks, layout)
    dense = dequantise(parts.codes, parts.scales, layout.format, layout.dim)
    expected = torch.where(rows[:, None] >= 0, dense[rows], 0)
    assert torch.equal(packed_gather(chunks, rows, layout), expected)
    inverse = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed_gather(chunks, rows, layout, inverse), expected[inverse])
    assert packed_gather([], rows[rows < 0], layout).eq(0).all()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_update_is_dequantise_then_optimizer_then_quantise(backend, layout, rounding):
    layout = layout._replace(nearest=int(rounding == "nearest"))
    chunks = packed_table(layout)
    before = parts_of(chunks, layout)
    given, grads = batch(layout)
    chosen, ids, inverse = given
    packed_update(chunks, given, grads, layout, SETTINGS, stream=STREAM)
    found = parts_of(chunks, layout)

    w = dequantise(before.codes, before.scales, layout.format, layout.dim)
    dense = [torch.cat([w, before.state], dim=1)]
    padded = torch.zeros((32, dense[0].shape[1]))
    padded[:ROWS] = dense[0]
    update(layout.optimizer, [padded], chosen, grads, inverse, settings=SETTINGS)
    known = chosen >= 0
    rows, w, state = chosen[known], padded[:, : layout.dim], padded[:, layout.dim :]
    scales = None if before.scales is None else before.scales[rows]
    codes = quantise(w[rows].contiguous(), scales, layout.format, rounding=rounding, ids=ids[known], stream=STREAM)
    assert torch.equal(found.codes[rows], codes)
    tolerance = 0.008 if layout.moments else 1e-6  # bf16 moments: a unit in their last place
    torch.testing.assert_close(found.state[rows], state[rows], rtol=tolerance, atol=1e-6)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(found.bytes(layout)[others], before.bytes(layout)[others])
    if before.scales is not None:
        assert torch.equal(found.scales, before.scales)


def test_bf16_moments_keep_their_expectation(backend):
    """Both fall by a tenth of a unit in their last place: nearest rounding would hold them for ever."""
    layout = packed_layout("fp32", 16, "adam", state_format="bf16")
    rows = 2048
    chunks = packed_table(layout, rows, rows)
    parts = parts_of(chunks, layout)
    parts.state[:, :-1] = 1.0
    chunks = [parts.bytes(layout)]
    grads, every = torch.zeros((rows, 16)), torch.arange(rows)
    for step in range(20):
        settings = OptimizerSettings(0.0, beta1=0.9999, beta2=0.9999, beta=0.0)
        packed_update(chunks, BatchRows(every, every), grads, layout, settings, stream=stream(0, 0, step))
    moments = parts_of(chunks, layout).state[:, :32].view(rows, 2, 16).mean(dim=(0, 2))
    assert moments.tolist() == pytest.approx([0.9999**20] * 2, abs=1e-4)


def dense_scales(w_new, steps, grads, format):
    """Autograd through w^ = D clamp(round(w / D)), rounding straight through; the clamp is that of the quotient."""
    low, high = code_range(format)
    d = steps.double().clone().requires_grad_()
    x = w_new.double() / d[:, None]
    rounded = x + (x.round() - x).detach()
    inside = (x > low) & (x < high)
    ahead = d[:, None] * torch.where(inside, rounded, x.detach().clamp(low, high).round())
    (ahead * grads.double()).sum().backward()
    return d.grad, ahead.detach()


@pytest.mark.parametrize("layout", LEARNED, ids=str)
def test_learned_scales_follow_the_gradient_of_a_dense_definition(backend, layout):
    """All three parts of ALPT's step: held values, the look ahead, and the scales with the values stored."""
    chunks = packed_table(layout, scale=2.0)
    before = parts_of(chunks, layout)
    given, grads = batch(layout)
    chosen, ids, inverse = given
    held = torch.empty((len(chosen), layout.dim))
    packed_update(chunks, given, grads, layout, SETTINGS, stream=STREAM, held=held)
    middle, known = parts_of(chunks, layout), chosen >= 0
    rows = chosen[known]
    assert torch.equal(middle.codes, before.codes) and torch.equal(middle.scales, before.scales)
    assert held[~known].eq(0).all()

    second = torch.randn(grads.shape, generator=torch.Generator().manual_seed(9))
    merged = torch.zeros_like(held).index_add_(0, inverse, second)[known]
    slope, ahead = dense_scales(held[known], before.scales[rows], merged, layout.format)
    found = packed_fake_quantise(chunks, chosen, held, layout, inverse)
    torch.testing.assert_close(found[known[inverse]], ahead[(known.cumsum(0) - 1)[inverse[known[inverse]]]].float())
    assert found[~known[inverse]].eq(0).all()

    settings = OptimizerSettings(0.02, 0.1, 1e-8, 0.8, 0.95, 0.0, gradient_scale=0.37)
    packed_learn_scales(chunks, given, second, layout, settings, stream=STREAM, held=held)
    after = parts_of(chunks, layout)
    expected = scales_by_hand(layout, before, rows, 0.37 * slope, settings)
    torch.testing.assert_close(after.scales[rows].double(), expected, rtol=2e-5, atol=1e-6)
    codes = quantise(held[known], after.scales[rows], layout.format, ids=ids[known], stream=STREAM)
    assert torch.equal(after.codes[rows], codes)
    assert torch.equal(after.state, middle.state)


def scales_by_hand(layout, before, rows, slope, settings):
    lr, decay, eps, beta1, beta2 = settings[:5]
    d = before.scales[rows].double()
    g = slope + decay * d
    state = before.scale_state[rows].double()
    if layout.optimizer == "sgd":
        d = d - lr * g
    elif layout.optimizer == "adam":
        t = state[:, 2] + 1
        m, v = beta1 * state[:, 0] + (1 - beta1) * g, beta2 * state[:, 1] + (1 - beta2) * g * g
        d = d - lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t).sqrt() + eps)
    else:
        d = d - lr * g / ((state[:, 0] + g * g).sqrt() + eps)
    return torch.maximum(d, before.scales[rows].double() / 2)


@pytest.mark.parametrize("state_format", ["fp32", "bf16"])
@pytest.mark.parametrize("every", [1, 3, 8])
def test_adam_corrects_moments_of_scales_by_their_own_count(backend, state_format, every):
    """Scales are learned in every k-th step of a row only. A constant gradient then moves them by the whole rate
    each time; corrected by the count of the row's steps, the first moves would be up to three times as long."""
    layout, rate = packed_layout("int8", 4, "adam", learned=True, state_format=state_format), 1e-4
    chunks = packed_table(layout, 64, 64)
    parts = parts_of(chunks, layout)
    parts.scales[:], parts.state[:], parts.scale_state[:] = 0.01, 0.0, 0.0
    chunks, rows = [parts.bytes(layout)], torch.arange(64)
    held, grads = torch.full((64, 4), 10.0), torch.ones(64, 4)  # beyond the range, so that the slope stays the same
    learned = 0
    for step in range(6 * every):
        packed_update(chunks, BatchRows(rows, rows), grads, layout, SETTINGS, stream=STREAM)
        if step % every == every - 1:
            settings = OptimizerSettings(rate, beta=0.0, gradient_scale=1e-3)
            packed_learn_scales(chunks, BatchRows(rows, rows), grads, layout, settings, stream=STREAM, held=held)
            learned += 1
            found = parts_of(chunks, layout)
            torch.testing.assert_close(found.scales, torch.full((64,), 0.01 - rate * learned), rtol=1e-5, atol=0)
            assert found.scale_state[:, 2].eq(learned).all() and found.state[:, -1].eq(step + 1).all()


def test_a_scale_stays_above_zero(backend):
    layout = packed_layout("int8", 4, "sgd", learned=True)
    chunks = packed_table(layout)
    before = parts_of(chunks, layout).scales[0].item()
    held, rows = torch.full((1, 4), 1e9), torch.tensor([0])
    settings = SETTINGS._replace(learning_rate=1.0)
    packed_learn_scales(chunks, BatchRows(rows, rows), torch.ones(1, 4), layout, settings, stream=STREAM, held=held)
    assert parts_of(chunks, layout).scales[0].item() == pytest.approx(before / 2)


@needs_cpp
@pytest.mark.parametrize("layout", some_of(LAYOUTS + LEARNED), ids=str)
def test_backends_and_threads_agree(on_threads, layout):
    """Threads change no bit; backends may round sums differently, which moves few codes by one."""

    def work():
        chunks = packed_table(layout, 2048, 256)
        for seed in range(2):
            given, grads = batch(layout, seed, 1500, 5000, 2048)
            held = torch.empty((len(given.rows), layout.dim)) if layout.learned else None
            packed_update(chunks, given, grads, layout, SETTINGS, stream=STREAM + seed, held=held)
            if layout.learned:
                settings = SETTINGS._replace(gradient_scale=0.1)
                packed_learn_scales(chunks, given, grads, layout, settings, stream=STREAM, held=held)
        return torch.cat(chunks), packed_gather(chunks, torch.arange(2048), layout)

    with use_backend("reference"):
        parts, values = parts_of([work()[0]], layout), work()[1]
    one, two = on_threads(1, work), on_threads(2, work)
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(parts_of([one[0]], layout).state, parts.state, rtol=0.01, atol=1e-4)
    same = torch.isclose(one[1], values, rtol=1e-4, atol=1e-5)
    assert same.float().mean() > 0.99
    biggest = parts.scales.max() * 1.01 if is_int(layout.format) else 0.05
    assert (one[1] - values).abs().max() <= biggest


def test_refused_arguments(backend):
    layout = packed_layout("int8", 4, "sgd")
    chunks, rows, grads = packed_table(layout), torch.tensor([1, 2]), torch.ones(2, 4)
    with pytest.raises(ValueError, match="chunks: expected rows of 8 bytes, found 12"):
        packed_gather(packed_table(packed_layout("int8", 4, "rowwise_adagrad")), rows, layout)
    with pytest.raises(ValueError, match="ids: expected 2 as there are rows, found 1"):
        packed_update(chunks, BatchRows(rows, rows[:1]), grads, layout, SETTINGS, stream=1)
    given = BatchRows(rows, rows)
    with pytest.raises(ValueError, match=r"grads: expected float32 \[2, 4\]"):
        packed_update(chunks, given, grads[:, :3], layout, SETTINGS, stream=1)
    with pytest.raises(ValueError, match=r"held: expected contiguous float32 \[2, 4\]"):
        packed_update(chunks, given, grads, layout, SETTINGS, stream=1, held=torch.ones(1, 4))
    with pytest.raises(ValueError, match="layout: expected one with a learned scale"):
        packed_learn_scales(chunks, given, grads, layout, SETTINGS, stream=1, held=grads)
    with pytest.raises(IndexError, match=f"rows: expected below {ROWS}, found {ROWS}"):
        packed_update(chunks, BatchRows(torch.tensor([1, ROWS]), rows), grads, layout, SETTINGS, stream=1)
    with pytest.raises(IndexError, match="inverse: expected below 2, found"):
        packed_update(chunks, BatchRows(rows, rows, torch.tensor([0, 2])), grads, layout, SETTINGS, stream=1)
    for format, optimizer, learned in (("int3", "sgd", False), ("fp16", "sgd", True), ("int8", "ftrl", True)):
        with pytest.raises(ValueError, match="expected one"):
            packed_layout(format, 4, optimizer, learned=learned)
    with pytest.raises(ValueError, match="state_format: expected fp32 for sgd, found bf16"):
        packed_layout("int8", 4, "sgd", state_format="bf16")


@needs_cpp
def test_schemas_and_fake_kernels():
    layout = packed_layout("int4", 4, "adam", learned=True)
    chunks, ((rows, ids, inverse), grads) = packed_table(layout), batch(layout)
    held, ops = torch.zeros((len(rows), 4)), torch.ops.tessera
    numbers, settings = list(layout), list(SETTINGS)
    torch.library.opcheck(ops.packed_gather.default, (chunks, rows, numbers, inverse))
    torch.library.opcheck(ops.packed_fake_quantise.default, (chunks, rows, held, numbers, None))
    for op, values in ((ops.packed_update, None), (ops.packed_update, held), (ops.packed_learn_scales, held)):
        torch.library.opcheck(op.default, (chunks, rows, ids, grads, inverse, values, numbers, settings, 7))

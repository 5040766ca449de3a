"""Rounding to formats of low precision against their definition in float64, exhaustively where codes are few."""

import math

import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.formats import FORMATS, ROUNDINGS, code_range, is_int, stored_columns, stored_dtype
from tessera.kernels.quantise import dequantise, quantise
from tessera.kernels.random import draws as draws_of
from tessera.kernels.random import stream

INTS = ("int8", "int4", "int2")
FLOATS = ("fp16", "bf16")
needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
MANTISSA = {"fp16": (10, -14, 65504.0), "bf16": (7, -113, float(torch.finfo(torch.bfloat16).max))}


def edge_values(format, step):
    """All codes, the middles between them, their neighbours in float32, beyond the range, zeros and infinities."""
    low, high = code_range(format)
    points = torch.arange(2 * low - 8, 2 * high + 9, dtype=torch.float64) / 2 * step
    values = points.float()
    inf = torch.tensor(math.inf)
    around = [values, torch.nextafter(values, inf), torch.nextafter(values, -inf)]
    extremes = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3e38, -3e38, 1e-45, -1e-45])
    return torch.cat([*around, extremes])


def in_float64(x, draws):
    """Rounded to an integer: x float64, draws float64 or None for nearest."""
    if draws is None:
        return x.round()
    below = x.floor()
    return below + (draws < x - below).double()


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 16, 33, 64, 71])
@pytest.mark.parametrize("step", [1.0, 0.01, 2.0**-20, 1e-6, 12.5])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", INTS)
def test_codes_equal_the_definition_in_float64(backend, format, rounding, step, dim):
    values = edge_values(format, step)
    rows = -(-len(values) // dim)
    values = torch.cat([values, values[: rows * dim - len(values)].clone()]).view(rows, dim)
    steps, ids = torch.full((rows,), step), torch.arange(rows) * 7919 - 5
    stored = quantise(values, steps, format, rounding=rounding, ids=ids, stream=stream(3, 4, 5))
    assert stored.dtype == stored_dtype(format) and stored.shape == (rows, stored_columns(format, dim))
    # The quotient is defined in float32; from there on float64 is exact.
    x = (values / steps[:, None]).double()
    draws = draws_of(3, 4, ids, dim, 5).double() if rounding == "stochastic" else None
    expected = in_float64(x, draws).clamp(*code_range(format)) * steps.double()[:, None]
    found = dequantise(stored, steps, format, dim)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("format", INTS)
def test_every_byte_is_its_codes_and_comes_back(backend, format):
    """Each of the 256 bytes: lowest bits first, two's complement."""
    bits = {"int8": 8, "int4": 4, "int2": 2}[format]
    stored, dim = torch.arange(256, dtype=torch.uint8)[:, None], 8 // bits
    steps = torch.full((256,), 0.5)
    values = dequantise(stored, steps, format, dim)
    low, high = code_range(format)
    for byte in range(256):
        codes = [(byte >> bits * k) % 2**bits for k in range(dim)]
        assert values[byte].tolist() == [0.5 * (code - 2**bits if code > high else code) for code in codes]
    for rounding in ROUNDINGS:  # what a format can hold is not changed by any rounding
        assert quantise(values, steps, format, rounding=rounding, ids=torch.arange(256)).equal(stored)


@pytest.mark.parametrize("format", FLOATS)
def test_every_number_of_a_float_format_comes_back(backend, format):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(stored_dtype(format))
    every = every[every.isfinite()]
    if format == "bf16":
        every = every[(every == 0) | (every.float().abs() >= 2.0**-113)]
    values = dequantise(every[:, None].contiguous(), None, format, 1)
    assert torch.equal(values[:, 0], every.float())
    for rounding in ROUNDINGS:
        again = quantise(values, None, format, rounding=rounding, ids=torch.arange(len(every)))
        assert torch.equal(again[:, 0].float(), every.float())


def any_floats():
    """Random bits of float32 that are finite, and the borders of the formats."""
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    borders = torch.tensor([0.0, 65504.0, 65519.9, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 3.4e38, 2.0**-113, math.inf])
    values = torch.cat(
        [
            bits.view(torch.float32),
            torch.randn(40_000, generator=torch.Generator().manual_seed(1)) * 0.01,
            borders,
            -borders,
        ]
    )
    return values[~values.isnan()][:, None]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", FLOATS)
def test_floats_equal_the_definition_in_float64(backend, format, rounding):
    mantissa, lowest, most = MANTISSA[format]
    values = any_floats()
    ids = torch.arange(len(values))
    found = quantise(values, None, format, rounding=rounding, ids=ids, stream=stream(1, 2, 3))
    x = values.double()
    exponent = torch.where(x.isfinite(), torch.frexp(x)[1] - 1, 127).clamp(min=lowest)
    spacing = torch.pow(2.0, (exponent - mantissa).double())
    draws = draws_of(1, 2, ids, 1, 3).double() if rounding == "stochastic" else None
    expected = (in_float64(x / spacing, draws) * spacing).clamp(-most, most)
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("format", FLOATS)
def test_nearest_is_what_torch_does_inside_the_range(backend, format):
    values = any_floats()
    limit, least = MANTISSA[format][2], 2.0**-113
    values = values[(values.abs() < limit) & (values.abs() > least)][:, None]
    found = quantise(values, None, format, rounding="nearest")
    assert torch.equal(found, values.to(stored_dtype(format)))


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "fp32"])
def test_the_expectation_of_stochastic_rounding_is_the_value(backend, format):
    """200,000 draws per value: the mean is within 5 standard errors, and both neighbours occur."""
    step, draws = 0.01, 200_000
    low, high = code_range(format) if is_int(format) else (-2, 1)
    wanted = [(low + 0.3) * step, -0.003, 0.0001, 0.25 * step, 0.0071, (high - 0.9) * step]
    values = torch.tensor(wanted).expand(draws, -1).contiguous()
    steps = torch.full((draws,), step)
    stored = quantise(values, steps, format, ids=torch.arange(draws), stream=stream(9, 0))
    found = dequantise(stored, steps, format, len(wanted)).double()
    for c, value in enumerate(values[0].double().tolist()):
        levels = found[:, c].unique()
        assert len(levels) == 2 and levels[0] < value < levels[1]
        spread = math.sqrt((value - levels[0]) * (levels[1] - value) / draws)
        assert abs(found[:, c].mean() - value) < 5 * spread


def test_draws_depend_on_seed_table_id_step_and_column_alone(backend):
    values, ids = torch.full((50, 16), 0.005), torch.arange(50)
    steps, key = torch.full((50,), 0.01), {"seed": 1, "table": 2, "step": 3}
    one = quantise(values, steps, "int8", ids=ids, stream=stream(**key))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantise(values, steps, "int8", ids=ids[order], stream=stream(**key)), one[order])
    narrow = quantise(values[:, :5].contiguous(), steps, "int8", ids=ids, stream=stream(**key))
    assert torch.equal(narrow, one[:, :5])
    for name in key:
        assert not torch.equal(quantise(values, steps, "int8", ids=ids, stream=stream(**{**key, name: 77})), one)


@needs_cpp
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", FORMATS)
def test_backends_and_threads_give_the_same_bits(on_threads, format, rounding):
    values = torch.randn((4_000, 19), generator=torch.Generator().manual_seed(0))
    steps = torch.rand(4_000, generator=torch.Generator().manual_seed(1)) + 0.001
    ids = torch.arange(4_000) * 31 - 2**40

    def work():
        stored = quantise(values, steps, format, rounding=rounding, ids=ids)
        return stored, dequantise(stored, steps, format, 19)

    with use_backend("reference"):
        expected = work()
    for found in (on_threads(1, work), on_threads(2, work)):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_refused_arguments(backend):
    values, steps = torch.zeros(2, 4), torch.ones(2)
    with pytest.raises(ValueError, match="format: expected one of fp32, fp16, bf16, int8, int4, int2, found 'int3'"):
        quantise(values, steps, "int3")
    with pytest.raises(ValueError, match="rounding: expected one of stochastic, nearest, found 'up'"):
        quantise(values, steps, "int8", rounding="up")
    with pytest.raises(ValueError, match=r"scales: expected float32 \[n\] for int8, found None"):
        quantise(values, None, "int8", rounding="nearest")
    with pytest.raises(ValueError, match=r"ids: expected int64 \[n\] for stochastic rounding, found None"):
        quantise(values, steps, "int8")
    with pytest.raises(ValueError, match="ids: expected 2 as there are rows, found 1"):
        quantise(values, steps, "int8", ids=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="values: expected float32"):
        quantise(values.double(), steps, "int8", rounding="nearest")
    with pytest.raises(ValueError, match=r"stored: expected torch.uint8 \[n, 3\] for 5 values of int4, found"):
        dequantise(torch.zeros((2, 2), dtype=torch.uint8), steps, "int4", 5)


@needs_cpp
@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_schema_and_fake_kernel(number):
    values, steps, ids = torch.rand(3, 5), torch.ones(3), torch.arange(3)
    torch.library.opcheck(torch.ops.tessera.quantise.default, (values, steps, number, ids, 7, "stochastic"))
    stored = torch.ops.tessera.quantise(values, steps, number, ids, 7, "stochastic")
    torch.library.opcheck(torch.ops.tessera.dequantise.default, (stored, steps, number, 5))

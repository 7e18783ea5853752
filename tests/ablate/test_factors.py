"""Which combinations a sweep measures: canonical cells mean the same bytes, others do not; what is impossible is refused."""

from dataclasses import replace

import pytest
import torch

from loftq import QuantSpec, decompose
from loftq.ablate.factors import FACTORS, Factors, Sweep
from loftq.config import METHODS
from loftq.errors import ConfigError
from loftq.solver.importance import InputStatistics

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "text.txt"


@pytest.fixture(scope="module")
def layer():
    """A weight, and full statistics of its inputs, gradients included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator) * torch.linspace(0.1, 2, 64)
    g = torch.randn(200, 48, generator=generator) * torch.linspace(0.5, 1.5, 48)
    return torch.randn(48, 64, generator=generator), InputStatistics(
        x.T @ x / 200,
        x.abs().mean(0),
        tokens=200,
        fisher_rows=g.abs().mean(0),
        fisher_columns=x.abs().mean(0),
        output_moment=g.T @ g / 200,
        guided_moment=x.T @ (x * g.square().sum(1, keepdim=True)) / g.square().sum(),
    )


def quantized(layer, cell: Factors):
    weight, statistics = layer
    found = decompose(
        weight,
        QuantSpec(bits=int(cell.bits), codebook=cell.codebook),
        rank=max(1, cell.rank),
        num_iter=cell.iters,
        method=cell.method,
        damping=cell.damping,
        importance=None if cell.calibration is None else statistics,
    )
    return found.dequantize()


def asked(method, iters, calibration=TEXT, **changes):
    return Factors(method, 2, 4, iters, calibration=calibration, **changes)


@pytest.mark.parametrize("iters", [0, 1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_cell_is_the_one_asked_for(layer, method, iters):
    cell = asked(method, iters)
    resolved = cell.resolved(training=False)
    torch.testing.assert_close(quantized(layer, resolved), quantized(layer, cell), rtol=0, atol=0)


def test_equal_cells_are_few_enough(layer):
    """No two resolved cells without training give the same matrix: what means the same is measured once."""
    choosers = ("auto", "srr")  # which may choose what another method does
    methods = [method for method in METHODS if method not in choosers]
    cells = {asked(method, iters).resolved(False) for method in methods for iters in (0, 1, 3)}
    found = [quantized(layer, cell) for cell in cells]
    names = list(cells)
    same = [(names[i], names[j]) for i in range(len(found)) for j in range(i) if torch.equal(found[i], found[j])]
    assert not same, same


def test_what_makes_no_difference():
    plain = asked("loftq", 0).resolved(False)
    assert plain == Factors("qlora", 2, 0, 0)
    for method in ("loftq-svd-first", "rtn", "pissa", "qpissa", "srr", "qera", "lq-lora"):
        assert asked(method, 0, damping=0.3).resolved(False) == plain, method
    assert asked("rtn", 5).resolved(False) == plain
    assert asked("loftq", 0).resolved(training=True).rank == 4, "B is 0 at the start, but it is trained"
    assert asked("caldera", 0).resolved(False) == asked("gptq", 7).resolved(False)
    assert asked("pissa", 5).resolved(False) == asked("loftq-svd-first", 1).resolved(False)
    assert asked("pissa", 5).resolved(False).iters == 1
    assert asked("loftq", 5).resolved(False).calibration is None
    assert asked("lq-lora", 5, damping=0.5).resolved(False).damping is None
    assert asked("cloq", 5).resolved(False) == asked("cloq", 1, damping=0.01 / 1.01).resolved(False)
    assert asked("loftq-data", 5).resolved(False).damping == 0.005
    assert asked(None, 5).resolved(False).method == "loftq-data"
    assert replace(asked(None, 5), bits=2.5).resolved(False).method == "loftq-data"
    assert replace(asked(None, 5), bits=3).resolved(False).method == "loftq-data-zero"
    assert asked(None, 5, None).resolved(False).method == "loftq"


def test_one_factor_at_a_time():
    sweep = Sweep(bits=(2, 3, 4), iters=(1, 5), rank=(8, 32))
    assert sweep.base_cell == Factors(None, 4, 8, 5)
    cells = sweep.cells(False)
    assert Sweep(iters=(0, 1, 3)).base_cell.iters == 3
    assert Sweep(calibration=(TEXT, None)).base_cell.calibration == TEXT
    changed = [[n for n in FACTORS if getattr(cell, n) != getattr(sweep.base_cell, n)] for cell in cells]
    assert sorted(map(tuple, changed)) == [(), ("bits",), ("bits",), ("iters",), ("rank",)]


def test_qlora_beside_bits_rank_and_codebook():
    sweep = Sweep(bits=(2, 4), iters=(0, 5), rank=(8, 16), codebook=("lloyd", "nf"), base={"bits": 2})
    found = {(c.method, c.bits, c.rank, c.codebook) for c in sweep.cells(False).values() if c.iters == 0}
    assert found == {("qlora", 2, 0, "lloyd"), ("qlora", 4, 0, "lloyd"), ("qlora", 2, 0, "nf")}
    trained = [c for c in sweep.cells(True).values() if c.iters == 0]
    assert sorted((c.bits, c.rank, c.codebook) for c in trained) == [
        (2, 8, "lloyd"),
        (2, 16, "lloyd"),
        (2, 16, "nf"),
        (4, 16, "lloyd"),
    ]


def test_grid():
    sweep = Sweep(method=("loftq", "loftq-svd-first"), iters=(0, 1, 5), bits=(2, 4), grid=True)
    cells = sweep.cells(False)
    assert len(cells) == 12
    assert len(set(cells.values())) == 10, "T = 0 is the same for both orders"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": ()}, "bits is empty"),
        ({"bits": (2, 2)}, "bits is 2, 2, expected different values"),
        ({"bits": (1,)}, "bits is 1, expected a number from 2 to 8"),
        ({"rank": (0,)}, "rank is 0"),
        ({"iters": (-1,)}, "iters is -1"),
        ({"method": ("lofq",)}, "did you mean loftq"),
        ({"codebook": ("nf4",)}, "codebook is 'nf4'"),
        ({"damping": (2.0,)}, "damping is 2.0"),
        ({"base": {"bits": 2}}, "the base has bits 2, expected one of the values 4"),
        ({"base": {"alpha": 2}}, "factor of the base is 'alpha'"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sweep(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ("loftq-data",)}, "without a calibration text"),
        ({"method": ("loftq", "qera"), "calibration": (None, TEXT)}, "name the text first"),
        ({"damping": (0.1, 0.2)}, "damping has the values 0.1, 0.2, which make no difference"),
        ({"method": ("loftq",), "calibration": (None, TEXT)}, "calibration has the values none, text.txt"),
        ({"method": ("qlora", "rtn")}, "method has the values qlora, rtn"),
        ({"method": ("qera",), "calibration": (TEXT,), "iters": (1, 5)}, "iters has the values 1, 5"),
    ],
)
def test_impossible_or_pointless(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sweep(**changes).cells(False)


def test_text_first():
    cells = Sweep(method=("loftq", "qera"), calibration=(TEXT, None)).cells(False)
    assert {(c.method, c.calibration) for c in cells.values()} == {("loftq", None), ("qera", TEXT)}

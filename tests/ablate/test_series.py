"""Lines of pictures: which cells they join, and what they are called."""

import pytest

from loftq.ablate import Ablation, Row, Sweep
from loftq.ablate.series import MOST, names, series


def rows(settings):
    return {cell: Row(cell, frobenius=1.0) for cell in settings.cells().values()}


def test_lines_of_a_grid_share_t_0():
    settings = Ablation("m", Sweep(method=("loftq", "loftq-svd-first"), iters=(0, 1, 5), rank=(8,), grid=True))
    lines = series(settings, rows(settings), "iters")
    assert [list(line.cells) for line in lines] == [[0, 1, 5]] * 2
    assert lines[0].cells[0] is lines[1].cells[0]
    assert names(lines, "iters") == (["loftq", "loftq-svd-first"], "4 bits, rank 8, lloyd")


def test_qlora_beside_loftq():
    settings = Ablation("m", Sweep(bits=(2, 3, 4), iters=(0, 1, 5), rank=(4, 8), base={"rank": 4}))
    lines = series(settings, rows(settings), "bits")
    assert names(lines, "bits") == (["loftq", "QLoRA (T = 0)"], "T = 5, rank 4, lloyd")
    along_rank = series(settings, rows(settings), "rank")
    assert [list(line.cells) for line in along_rank] == [[4, 8]] * 2
    assert names(along_rank, "rank")[0] == ["loftq", "QLoRA (T = 0)"]


def test_too_many_lines():
    sweep = Sweep(
        bits=(2, 3, 4), rank=(4, 8, 16), iters=(0, 1, 5), codebook=("nf", "lloyd"), grid=True, base={"rank": 8}
    )
    settings = Ablation("m", sweep)
    lines = series(settings, rows(settings), "bits")
    assert 1 < len(lines) <= MOST
    assert {(line.factors.rank, line.factors.codebook) for line in lines if line.factors.rank} == {
        (r, "lloyd") for r in (4, 8, 16)
    }


def test_failed_cells_are_left_out():
    settings = Ablation("m", Sweep(bits=(2, 4), iters=(0, 5), rank=(4,)))
    found = rows(settings)
    failed = next(cell for cell in found if cell.iters == 0 and cell.bits == 2)
    found[failed] = Row(failed, error="no")
    (line,) = series(settings, found, "bits")
    assert line.factors.method == "loftq"


@pytest.mark.parametrize("calibration", [("a.txt", "b.txt"), ("a.txt",)])
def test_texts_are_named_where_they_differ(calibration):
    sweep = Sweep(calibration=tuple(f"dir/{c}" for c in calibration), bits=(2, 4), damping=(0.1, 0.2), grid=True)
    settings = Ablation("m", sweep)
    found, common = names(series(settings, rows(settings), "bits"), "bits")
    assert all("λ = " in name for name in found)
    assert all(("on a.txt" in name) or ("on b.txt" in name) for name in found) == (len(calibration) == 2)
    assert ("on a.txt" in common) == (len(calibration) == 1)

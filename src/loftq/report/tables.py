"""Results as tables on a terminal, or as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loftq.errors import counted
from loftq.report.record import QuantizationReport


def console() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def size(num_bytes: float) -> str:
    """Bytes in decimal units: ``34.6 MB``."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def number(value: float) -> str:
    """Four significant digits; powers of ten for what no one reads digit by digit."""
    if not math.isfinite(value):
        return "overflow"
    if value >= 1e5:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def table(columns: dict[str, str], rows: list[list[str]]) -> Table:
    """A plain table; ``columns`` maps a heading to ``left`` or ``right``."""
    result = Table(box=box.SIMPLE, pad_edge=False)
    for heading, justify in columns.items():
        result.add_column(heading, justify=justify, no_wrap=justify == "right")  # type: ignore[arg-type]
    for row in rows:
        result.add_row(*row)
    return result


def weight_errors(report: QuantizationReport) -> str:
    """One line on how far Q + BA is from W; larger than rounding alone where something else was minimised."""
    rounded, found = report.mean_quantization_error, report.mean_error
    return f"mean relative error of the weights {found:.4f} with Q + BA, {rounded:.4f} if W were only rounded" + (
        ": calibrated methods let it grow where the inputs do not look"
        if report.calibration and found > rounded
        else ""
    )


def calibrated_on(report: QuantizationReport) -> str:
    """One line on the calibration text."""
    text = report.calibration
    assert text is not None
    known = [m for m in report.modules if m.calibration_tokens]
    share = sum(m.objective or 0.0 for m in known) / max(1, len(known))
    extras = [name for name in ("gradients", "propagate") if text.get(name)]
    unseen = len(report.modules) - len(known)
    return (
        f"calibrated on {text['name']}: {text['tokens']:,} tokens in {counted(text['windows'], 'window')}"
        + (f" with {' and '.join(extras)}" if extras else "")
        + f"; mean relative error of the outputs {share:.4f}"
        + (f"; {unseen} modules were never reached, there only the weight error counts" if unseen else "")
    )


def print_report(report: QuantizationReport, folder: Path, modules: bool = True) -> None:
    """A quantization's totals, and its modules where asked for."""
    out = console()
    if modules:
        columns = {
            "module": "left",
            "shape": "right",
            "bits": "right",
            "rank": "right",
            "bits/weight": "right",
            "size": "right",
            "adapter": "right",
            "error, rounded": "right",
            "error, Q + BA": "right",
            "step": "right",
        }
        rows = [
            [
                m.name,
                "×".join(map(str, m.shape)),
                str(m.bits),
                str(m.rank),
                f"{8 * m.weight_bytes / m.numel:.3f}",
                size(m.weight_bytes),
                size(m.adapter_bytes),
                f"{m.quantization_error:.4f}",
                f"{m.error:.4f}",
                f"{m.best_iter}/{len(m.errors) - 1}",
            ]
            for m in report.modules
        ]
        out.print(table(columns, rows))
    totals = report.totals()
    out.print(f"{totals['modules']} modules, {totals['weights']:,} weights in {folder}")
    out.print(
        f"{totals['bits_per_weight']:.3f} bits per weight: {size(totals['weight_bytes'])} packed, "
        f"{size(totals['adapter_bytes'])} adapter, {size(totals['other_bytes'])} unchanged"
    )
    if report.calibration is not None:
        out.print(calibrated_on(report))
    out.print(weight_errors(report))
    if report.timing:
        out.print(f"{report.timing['seconds']:.1f} s, peak memory {size(report.timing['peak_memory_bytes'])}")

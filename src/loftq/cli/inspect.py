"""``loftq inspect``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder that `loftq quantize` has written.")],
    check: Annotated[bool, typer.Option("--check", help="Also read all weights and compare their hashes.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what a quantized folder holds: bits, rank, bytes and error of every module, and totals."""
    from loftq.report.record import QuantizationReport
    from loftq.report.tables import print_json, print_report

    report = QuantizationReport.load(folder)
    if check:
        from loftq.errors import BackboneMismatchError
        from loftq.hub.backbone import adapter_sha256, backbone_sha256

        for what, actual, recorded in (
            ("weights", backbone_sha256(folder), report.backbone_sha256),
            ("fitted adapter", adapter_sha256(folder), report.adapter_sha256),
        ):
            if actual != recorded:
                raise BackboneMismatchError(
                    f"the {what} in {folder} have hash {actual[:12]}…, but the report says {recorded[:12]}…; they were "
                    f"changed or damaged, quantize again"
                )
    if json_output:
        print_json(report.to_dict())
    else:
        print_report(report, folder)

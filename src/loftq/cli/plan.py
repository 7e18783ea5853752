"""``loftq plan``"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import options, parse
from loftq.cli.quiet import quiet_transformers
from loftq.config import BITS, BLOCK_SIZES, METHODS, LoftQConfig, one_of
from loftq.errors import ConfigError

if TYPE_CHECKING:
    from loftq.plan.budget import Allocation, Budget
    from loftq.plan.errors import ErrorTable
    from loftq.plan.file import Choice

RULES = ("optimal", "first-layers")


def plan(
    model: options.Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan file to write, for `loftq quantize --plan`.")],
    target_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight, measured from stored bytes: scales and codebooks included.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help='Average width of the codes alone, the papers\' "2.5 bits".')
    ] = None,
    bits: Annotated[str, typer.Option(help=f"Widths to choose from: {options.choices(BITS)}.")] = options.choices(BITS),
    block_sizes: Annotated[
        str, typer.Option(help=f"Block sizes to choose from: {options.choices(BLOCK_SIZES)}.")
    ] = "64",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank of every adapter.", show_default="16")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks to choose from, within --rank-budget.")] = None,
    rank_budget: Annotated[
        str | None, typer.Option(help="Average rank such as 24, or the adapters' bytes in float32 such as 40MB.")
    ] = None,
    rule: Annotated[str, typer.Option(help=f"{options.choices(RULES)} (the paper's).")] = "optimal",
    layer_bits: Annotated[
        str, typer.Option(help="HIGH:LOW, bits of the first layers and of the others, for first-layers.")
    ] = "4:2",
    weighting: Annotated[
        str | None,
        typer.Option(
            help="How modules' errors are added up: relative or absolute.",
            show_default="absolute with gradients, relative without",
        ),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            help="Table of measured errors: used if it is there, continued, written.", show_default="beside OUT"
        ),
    ] = None,
    iters: Annotated[int, typer.Option("--iters", "--iter", help="Alternations T of each measurement.")] = 1,
    method: Annotated[
        str | None, typer.Option(help=f"{options.choices(METHODS)}.", show_default="as `quantize`")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text, as for `loftq quantize`.", show_default="pydoc for causal language models")
    ] = None,
    calibration_samples: options.CalibrationSamples = 128,
    calibration_length: options.CalibrationLength = 512,
    calibration_gradients: options.CalibrationGradients = 32,
    no_calibration: options.NoCalibration = False,
    statistics: options.Statistics = None,
    damping: options.Damping = None,
    codebook: options.Codebook = None,
    scale: options.Scale = None,
    scale_dtype: options.ScaleDtype = None,
    double_quant: options.DoubleQuant = False,
    published: options.Published = False,
    target_modules: options.TargetModules = None,
    exclude_modules: options.ExcludeModules = None,
    include_embeddings: Annotated[bool, typer.Option("--include-embeddings", help="The input embedding too.")] = False,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan's totals as JSON.")] = False,
) -> None:
    """Choose bits, block size and rank of every module for the smallest error within a budget."""
    if (target_bpw is None) == (target_bits is None):
        raise ConfigError(
            f"{'neither' if target_bpw is None else 'both'} of --target-bpw (measured bits per weight) and --target-bits "
            f"(width of the codes) given, expected one"
        )
    if rank is not None and ranks is not None:
        raise ConfigError("--rank and --ranks were both given; give one")
    one_of("--rule", rule, RULES)
    pair = _numbers("--layer-bits", layer_bits, ":")
    if len(pair) != 2:
        raise ConfigError(f"--layer-bits is {layer_bits!r}, expected HIGH:LOW such as 4:2")
    config = LoftQConfig(
        method=method,
        num_iter=iters,
        damping=damping,
        double_quant=double_quant,
        target_modules=parse.module_patterns(["all-linear"] if target_modules is None else target_modules) or (),
        exclude_modules=parse.module_patterns(exclude_modules),
        quantize_embeddings=include_embeddings,
        calibration=parse.calibration_text(calibration, statistics, no_calibration),
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        calibration_gradients=calibration_gradients,
        seed=seed,
        **parse.quantizer(published, codebook, scale, scale_dtype),
    )

    quiet_transformers()
    from loftq.checkpoint.writer import check_file
    from loftq.plan.budget import WEIGHTINGS, Budget, best_plan, best_weighting, comparisons, largest_first_layers
    from loftq.plan.errors import grid, measure_checkpoint
    from loftq.plan.file import Choice, PlanFile

    if weighting is not None:
        one_of("--weighting", weighting, WEIGHTINGS)
    budget = Budget(bits_per_weight=target_bpw, code_bits=target_bits, **_rank_budget(rank_budget))
    widths = pair if rule == "first-layers" else _numbers("--bits", bits)
    depths = _numbers("--ranks", ranks) if ranks is not None else (16 if rank is None else rank,)
    choices = grid(widths, _numbers("--block-sizes", block_sizes), depths)
    check_file(out, "the plan")
    if errors is not None:
        check_file(errors, "the measured errors")
    table = measure_checkpoint(
        model,
        config,
        choices,
        statistics=statistics,
        path=errors or out.with_name(f"{out.stem}.errors.json"),
        revision=revision,
        notice=lambda sentence: typer.echo(f"loftq: {sentence}", err=True),
    )
    weighting = weighting or best_weighting(table)
    base = _base(choices, budget)
    label = "plan"
    if rule == "first-layers":
        high, low = (Choice(b, base.block_size, base.rank) for b in pair)
        count, found = largest_first_layers(table, budget, high, low, weighting)
        label = f"first {count} layers {high.bits} bits, rest {low.bits}"
    else:
        found = best_plan(table, budget, weighting)
    others = comparisons(table, found, base, weighting)
    totals = {label: found.totals(), **{name: other.totals() for name, other in others.items()}}
    PlanFile(
        found.choices,
        source={"name": table.name, "sha256": table.settings["sha256"]},
        quantizer=table.quantizer,
        target=budget.to_dict(),
        rule=rule,
        predicted={"weighting": weighting, **totals},
        settings={k: v for k, v in table.settings.items() if k != "sha256" and k not in table.quantizer},
        versions=table.versions,
        command=parse.this_command(),
    ).save(out)
    if json_output:
        from loftq.report.tables import print_json

        print_json({"out": str(out), "weighting": weighting, "plans": totals})
    else:
        _print(table, found, {label: found, **others}, budget, out)


def _numbers(option: str, value: str, separator: str = ",") -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(separator)]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise ConfigError(f"{option} is {value!r}, expected whole numbers such as 2{separator}4")
    return tuple(map(int, parts))


def _rank_budget(value: str | None) -> dict[str, Any]:
    """``24`` is an average rank; ``40MB`` bytes of float32 adapters."""
    if value is None:
        return {}
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", value.strip()):
        return {"average_rank": float(value)}
    return {"adapter_bytes": parse.byte_size("--rank-budget", value)}


def _base(choices: tuple[Choice, ...], budget: Budget) -> Choice:
    """The plain plan to compare with: the middle block size, and the largest rank that the adapters' budget has room for."""
    blocks = sorted({c.block_size for c in choices})
    ranks = sorted({c.rank for c in choices})
    room = [r for r in ranks if budget.average_rank is None or r <= budget.average_rank]
    block = 64 if 64 in blocks else blocks[len(blocks) // 2]
    return next(c for c in choices if (c.block_size, c.rank) == (block, (room or ranks[:1])[-1]))


def _print(table: ErrorTable, found: Allocation, plans: dict[str, Allocation], budget: Budget, out: Path) -> None:
    from loftq.report.tables import console, number, size
    from loftq.report.tables import table as rows_of

    screen = console()
    single = len({(c.block_size, c.rank) for c in found.choices.values()}) == 1
    kinds: dict[str, Counter[Choice]] = {}
    layers: dict[str, list[str]] = {}
    for name, choice in found.choices.items():
        kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name).rpartition("*.")[2]
        kinds.setdefault(kind, Counter())[choice] += 1
        layer = table.modules[name].layer
        layers.setdefault("other" if layer is None else str(layer), []).append(str(choice.bits))
    headings = sorted(set(found.choices.values()))
    columns = {"module": "left"}
    for c in headings:
        columns[f"{c.bits} bits" if single else f"{c.bits}b/{c.block_size}/r{c.rank}"] = "right"
    lines = [[kind, *(str(count[c] or "") for c in headings)] for kind, count in kinds.items()]
    screen.print(rows_of(columns, lines))
    screen.print("bits by layer: " + "  ".join(f"{layer}: {'/'.join(b)}" for layer, b in layers.items()))
    columns = dict.fromkeys(("bits/weight", "code bits", "size", "adapter", "objective"), "right")
    lines = [
        [
            name,
            f"{p.bits_per_weight:.3f}",
            f"{p.code_bits:.3f}",
            size(p.weight_bytes),
            size(4 * p.adapter_parameters),
            number(p.objective),
        ]
        for name, p in plans.items()
    ]
    screen.print(rows_of({"": "left", **columns}, lines))
    if found.gap:
        screen.print(f"another plan could be better by at most {100 * found.gap:.2g} %")
    screen.print(
        f"plan of {len(found.choices)} modules in {out}; next: loftq quantize {table.name} --plan {out} --out ..."
    )

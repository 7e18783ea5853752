"""``loftq reproduce``"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq.cli import counts, options, parse
from loftq.cli.quiet import quiet_transformers
from loftq.errors import ConfigError

if TYPE_CHECKING:
    from loftq.recipes.dryrun import DryRun
    from loftq.recipes.recipe import Recipe
    from loftq.recipes.steps import Options


def reproduce(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="A recipe, or a file of one's own; with --list, a pattern such as 'glue/*'.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show the recipes with their published numbers.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the steps and check what needs no weights; run nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the results; an earlier run continues.", show_default="reproduce/NAME"
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, with commas.", show_default="those with published numbers")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of training, with commas; the median is compared.")] = "0",
    model: Annotated[str | None, typer.Option(help="Another model than the recipe's: a folder or a hub id.")] = None,
    revision: options.Revision = None,
    local: Annotated[
        Path | None, typer.Option(help="Folder with the data as files, such as train.jsonl and validation.jsonl.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(help="SPLIT=FILE of --local, where the file is called otherwise; repeatable."),
    ] = None,
    limit: options.Limit = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe, e.g. training.epochs=1; repeatable.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Run an experiment of the paper: quantize, train, evaluate, and print measured beside published."""
    if list_all:
        counts.refuse_strays(context)
        _list(name, json_output)
        return
    if name is None:
        raise ConfigError("no recipe is named, expected `loftq reproduce NAME`; --list shows the names")
    quiet_transformers()
    from loftq.recipes import load_recipe
    from loftq.recipes import reproduce as work
    from loftq.recipes.local import find_local
    from loftq.recipes.steps import Options
    from loftq.report.tables import print_json

    recipe = load_recipe(name, change or ())
    chosen = _files(file)
    if chosen and local is None:
        raise ConfigError("--file was given without --local; give the folder that the file is in")
    options = Options(
        out=Path("reproduce") / recipe.name if out is None else out,
        methods=parse.names("--methods", methods) or (),
        model=model,
        revision=revision,
        local={} if local is None else find_local(recipe, Path(os.path.expanduser(local)), chosen),
        limit=limit,
        seeds=parse.seeds(seeds),
    )
    if dry_run:
        from loftq.recipes.dryrun import dry_run as check

        found = check(recipe, options)
        if json_output:
            print_json(found.to_dict())
        else:
            _print_dry_run(found)
        return
    for step, fresh in work.reproduce(recipe, options):
        typer.echo(f"{step.name}{'' if fresh else ', done earlier'}", err=True)
    _print_comparison(recipe, options, json_output)


def _list(pattern: str | None, json_output: bool) -> None:
    from loftq.recipes import list_recipes, load_recipe
    from loftq.report.tables import console, print_json, table

    recipes = [load_recipe(name) for name in list_recipes(pattern)]
    if json_output:
        print_json([recipe.to_dict() for recipe in recipes])
        return
    screen = console()
    for title in dict.fromkeys(recipe.table for recipe in recipes):
        screen.print(title)
        rows = []
        for recipe in (r for r in recipes if r.table == title):
            rows += [
                ["" if i else recipe.name, method, ", ".join(numbers), _slashed(numbers)]
                for i, (method, numbers) in enumerate(recipe.published.items())
            ]
        screen.print(table(dict.fromkeys(("recipe", "method", "metrics", "published"), "left"), rows))
    screen.print(f"{len(recipes)} recipes; `loftq reproduce NAME --dry-run` shows what one does")


def _slashed(numbers: Mapping[str, float | None]) -> str:
    """Numbers as the paper prints them: ``84.7/85.1``, or N.A."""
    from loftq.recipes.comparison import as_printed

    shown = [as_printed(metric, number) for metric, number in numbers.items()]
    return "N.A." if set(shown) == {"N.A."} else "/".join(shown)


def _print_dry_run(found: DryRun) -> None:
    from loftq.recipes.comparison import comparison_table
    from loftq.report.tables import console, table

    recipe, options, screen = found.recipe, found.options, console()
    screen.print(f"{recipe.name}: {recipe.table}")
    model, revision = options.source(recipe)
    screen.print(f"{model}{f' at {revision}' if revision else ''} on {recipe.data.name}, {recipe.task}", markup=False)
    screen.print(table({"setting": "left", "value": "left", "not stated in the paper": "left"}, _settings_rows(recipe)))
    if options.local:
        rows = [
            [name, str(split.file), ", ".join(f"{c} = {r}" for c, r in split.map.items())]
            for name, split in options.local.items()
        ]
        screen.print(table(dict.fromkeys(("split", "file", "columns"), "left"), rows))
    for method, modules in found.modules.items():
        if modules is None:
            screen.print(f"{method}: the model's config.json is not on this machine, its modules are not listed")
        else:
            widths = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(modules.bits.items()))
            screen.print(
                f"{method}: {modules.modules} modules ({widths}), {modules.weights:,} weights at {modules.code_bits:g} bits "
                f"on average, {modules.adapter_parameters:,} in the adapter, {modules.other_weights:,} left alone"
            )
    screen.print("")
    for step in found.steps:
        screen.print(step.command, soft_wrap=True, markup=False)
    screen.print(comparison_table(recipe, ()))
    for note in _notes(recipe, options):
        screen.print(note, markup=False)


def _settings_rows(recipe: Recipe) -> list[list[str]]:
    rows = []
    values = recipe.to_dict()
    for section in ("quantization", "training", "data"):
        for key, value in (values[section] or {}).items():
            reason = recipe.unstated.get(f"{section}.{key}", "")
            if (section != "data" and value is not None) or reason:
                rows.append([key, str(value), reason])
    rows += [
        [key.partition(".")[2], "the default", reason]
        for key, reason in recipe.unstated.items()
        if key.startswith("quantization.") and key.partition(".")[2] not in (recipe.quantization or {})
    ]
    return rows


def _notes(recipe: Recipe, options: Options) -> list[str]:
    """What to know beside the numbers."""
    notes = list(recipe.notes)
    if recipe.published_size:
        notes.append(
            "Published size: " + ", ".join(f"{k.replace('_', ' ')} {v:g} %" for k, v in recipe.published_size.items())
        )
    if recipe.seeds is not None:
        notes.append(f"The published numbers are medians of {recipe.seeds} seeds; {len(options.seeds)} here.")
    shrunk = [f"the model {options.model}"] if options.model not in (None, recipe.model) else []
    shrunk += [f"{options.limit} examples of each split"] if options.limit is not None else []
    if shrunk:
        notes.append(f"Run with {' and '.join(shrunk)}: not comparable with the published numbers.")
    return notes


def _print_comparison(recipe: Recipe, options: Options, json_output: bool) -> None:
    from dataclasses import asdict

    from loftq.evaluate.rouge import told
    from loftq.recipes.comparison import compare, comparison_table
    from loftq.recipes.reproduce import measurements
    from loftq.report.tables import console, print_json

    methods = options.methods or recipe.runnable()
    measured = [m for m in measurements(options.out) if m.seed in options.seeds and m.method in methods]
    if json_output:
        lines = [asdict(line) for line in compare(recipe, measured)]
        shrunk = {"model": options.source(recipe)[0], "limit": options.limit, "notes": _notes(recipe, options)}
        print_json({"recipe": recipe.name, **shrunk, "results": lines})
        return
    screen = console()
    screen.print(f"\n{recipe.name}: {recipe.table}")
    screen.print(comparison_table(recipe, measured))
    rouge = dict.fromkeys(told(m.rouge) for m in measured if m.rouge is not None)
    for note in (*_notes(recipe, options), *rouge):
        screen.print(note, markup=False)


def _files(values: list[str] | None) -> dict[str, Path]:
    result = {}
    for value in values or ():
        split, equals, file = value.partition("=")
        if not equals or not split or not file:
            raise ConfigError(f"--file is {value!r}, expected SPLIT=FILE such as train=my-train.jsonl")
        result[split] = Path(os.path.expanduser(file))
    return result

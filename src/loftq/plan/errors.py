"""What each choice of bits, block size and rank costs each module: measured once, saved, and used for every budget.

A module's entry is the solver's objective after the low-rank term, relative to the module's own size:

    objective = |R (W - Q - L) P|_F / |R W P|_F,        H_λ = P Pᵀ,   G_γ = Rᵀ R

with H and G the second moments of the module's inputs and of the gradients in its outputs
(:mod:`loftq.solver.importance`); P and R are identities where they are not known.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import Source, open_source, sha256_file
from loftq.config import LoftQConfig, QuantSpec
from loftq.errors import ConfigError, SourceError
from loftq.parallel import run_side_by_side
from loftq.plan.file import QUANTIZER, Choice, read_rows, write_rows
from loftq.plan.measure import ModuleErrors, measure_module
from loftq.plan.targets import ModulePlan, layer_positions, plan_modules
from loftq.report.progress import bar
from loftq.report.system import versions
from loftq.units import Known, largest_factor, make_units

if TYPE_CHECKING:
    from loftq.calibrate.choose import Inputs
    from loftq.calibrate.statistics import Statistics

FORMAT = "loftq-errors"
VERSION = 1
_SAVE_SECONDS = 2.0  # an interruption loses no more than this, and saving a large table does not hold up the work


@dataclass
class ErrorTable:
    """Every planned module's :class:`ModuleErrors`, in the model's order, and what they were measured with.

    Attributes:
        modules: module name -> entry.
        settings: method, iterations, quantizer, calibration and the sha256 of the model's files; a table is used again
            only if all of them agree.
        name: of the model. versions: of the packages.
    """

    modules: dict[str, ModuleErrors]
    settings: dict[str, Any]
    name: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def quantizer(self) -> dict[str, Any]:
        return {key: self.settings[key] for key in QUANTIZER}

    def spec(self, choice: Choice) -> QuantSpec:
        """How a module of that choice is stored."""
        return QuantSpec(bits=choice.bits, block_size=choice.block_size, **self.quantizer)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; it appears complete or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        rows = {}
        for name, entry in self.modules.items():
            values = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry) if f.name != "objectives"}
            rows[name] = {**values, "objectives": [[*dataclasses.astuple(c), e] for c, e in entry.objectives.items()]}
        head = {"format": FORMAT, "version": VERSION, "name": self.name, "settings": self.settings}
        write_rows(
            path, {**head, "versions": self.versions, "columns": ["bits", "block_size", "rank", "objective"]}, rows
        )

    @classmethod
    def load(cls, path: str | Path) -> ErrorTable:
        """Read a table.

        Raises:
            SourceError: if there is none, or it is damaged.
        """
        path = Path(os.path.expanduser(path))
        values = read_rows(path, FORMAT, VERSION, "table of errors", "`loftq plan --errors`")
        try:
            modules = {}
            for name, row in values["modules"].items():
                objectives = {Choice(*entry[:3]): float(entry[3]) for entry in row.pop("objectives")}
                if not all(math.isfinite(e) and e >= 0 for e in (*objectives.values(), row["norm"], row["power"] or 0)):
                    raise ValueError(f"{name} has a negative or infinite number")
                modules[name] = ModuleErrors(**{**row, "shape": tuple(row["shape"])}, objectives=objectives)
            return cls(modules, dict(values["settings"]), str(values["name"]), dict(values["versions"]))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise SourceError(f"{path} is damaged ({error}); remove it and measure again") from None


def grid(bits: tuple[int, ...], block_sizes: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Choice, ...]:
    """Every combination, ascending.

    Raises:
        ConfigError: for a value that does not exist, or nothing to choose from.
    """
    choices = tuple(sorted({Choice(*values) for values in itertools.product(bits, block_sizes, ranks)}))
    if not choices:
        raise ConfigError("there is nothing to choose from, expected at least one of bits, block sizes and ranks each")
    return choices


def measure_errors(
    source: Source,
    config: LoftQConfig,
    choices: tuple[Choice, ...],
    *,
    inputs: Inputs | None = None,
    path: str | Path | None = None,
    hashes: Mapping[str, str] | None = None,
    progress: bool = True,
) -> ErrorTable:
    """Decompose every selected module with every choice, one weight at a time.

    Args:
        source: the model.
        config: selection, quantizer, method (``None``: see :func:`loftq.config.default_method`), ``num_iter``,
            damping, SVD and seed. Its own bits, block size and rank are not used.
        choices: from :func:`grid`.
        inputs: the calibration; without one the weights' errors count.
        path: where the table is kept. What it has already is not measured again; it grows as the work goes on, so that an
            interrupted run continues.
        hashes: sha256 of the model's files, where known already.
        progress: a bar on a terminal, a plain line now and then elsewhere.

    Raises:
        ConfigError: if the file at ``path`` was measured on another model or with other settings.
        SourceError, WeightError, OutputError: as :func:`loftq.quantize_checkpoint`.
    """
    model = meta_model(source.config())
    plans = plan_modules(model, config)
    layers = layer_positions([name for name, _ in model.named_modules()])
    parameters = Parameters(source, model)
    units = {unit.name: unit for unit in make_units(source, model, plans, parameters) if unit.plan is not None}
    config = config.replace(method=inputs.method if inputs is not None else config.method or "loftq")
    settings = {
        "sha256": dict(hashes or {file.name: sha256_file(file) for file in source.files}),
        "loftq": versions()["loftq"],
        **{key: getattr(config, key) for key in ("method", "num_iter", "damping", "svd", "seed", *QUANTIZER)},
        "calibration": inputs.summary if inputs is not None else None,
    }
    known = _matching_table(path, settings)
    table = ErrorTable(known, settings, str(source.path), versions())
    missing = {n: [c for c in choices if n not in known or c not in known[n].objectives] for n in plans}
    todo = [name for name in plans if missing[name]]
    work = {name: plans[name].numel * len(missing[name]) for name in todo}
    saved = time.monotonic()
    try:
        with (
            _maybe_bar(progress and bool(todo), sum(work.values())) as advance,
            _statistics(inputs, plans, todo) as found,
        ):

            def jobs() -> Iterator[tuple[tuple[str, int], Callable[[], ModuleErrors]]]:
                for name, statistics in found:
                    matrices = units[name].matrices(source, parameters)
                    size = max(plans[name].numel, largest_factor(statistics))
                    job = partial(measure_module, matrices, plans[name], missing[name], config, statistics)
                    yield (name, size), job

            for (name, _), (entry, _) in run_side_by_side(jobs(), lambda key: key[1]):
                before = known[name].objectives if name in known else {}
                merged = dict(sorted({**before, **entry.objectives}.items()))
                known[name] = dataclasses.replace(entry, layer=layers.get(name), objectives=merged)
                advance(name, work[name])
                if path is not None and time.monotonic() - saved > _SAVE_SECONDS:
                    table.save(path)
                    saved = time.monotonic()
    finally:
        if path is not None and todo and known:
            table.save(path)
    wanted = {
        name: dataclasses.replace(known[name], objectives={c: known[name].objectives[c] for c in choices})
        for name in plans
    }
    return dataclasses.replace(table, modules=wanted)


def _matching_table(path: str | Path | None, settings: dict[str, Any]) -> dict[str, ModuleErrors]:
    if path is None or not Path(os.path.expanduser(path)).exists():
        return {}
    table = ErrorTable.load(path)
    for key, value in settings.items():
        if table.settings.get(key) != value:
            what = f"{key} {table.settings.get(key)!r}" if key not in ("sha256", "calibration") else f"another {key}"
            raise ConfigError(
                f"{path} holds errors measured with {what.replace('sha256', 'model')}, expected those of this model and "
                f"these settings; give another file or remove this one"
            )
    return table.modules


@contextmanager
def _maybe_bar(show: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    if not show:
        yield lambda name, weights: None
        return
    with bar(total, "measuring") as advance:
        yield advance


@contextmanager
def _statistics(
    inputs: Inputs | None, plans: Mapping[str, ModulePlan], todo: list[str]
) -> Iterator[Iterator[tuple[str, Known]]]:
    """(module, statistics of its inputs) for every module to do, in the order in which they become known."""
    if inputs is None:
        yield ((name, None) for name in todo)
        return
    covered = set(inputs.targets)
    rest: list[tuple[str, Known]] = [(name, inputs.unseen(plans[name])) for name in todo if name not in covered]
    with inputs.open(any(name in covered for name in todo)) as groups:
        given = (
            (n, g.experts or g.statistics())
            for g in groups
            if not set(todo).isdisjoint(g.names)
            for n in g.names
            if n in todo
        )
        yield itertools.chain(rest, given)


def measure_checkpoint(
    source: Source | str | Path,
    config: LoftQConfig,
    choices: tuple[Choice, ...],
    *,
    statistics: Statistics | str | Path | None = None,
    path: str | Path | None = None,
    revision: str | None = None,
    notice: Callable[[str], None] = lambda sentence: None,
    progress: bool = True,
) -> ErrorTable:
    """:func:`measure_errors` of a checkpoint with the calibration that quantizing it would have.

    Args:
        source: folder with safetensors, ``.gguf`` file, or hub id.
        statistics: of the layers' inputs, or their file; otherwise ``config.calibration`` says what to collect them on.
        revision: of a hub id.
        notice: told in one sentence what was chosen where the config leaves it open.
        config, choices, path, progress: see :func:`measure_errors`.

    Raises:
        LoftQError: see :func:`measure_errors`.
    """
    from loftq.calibrate.choose import calibrated

    opened = open_source(source, revision) if isinstance(source, (str, Path)) else source
    model = meta_model(opened.config())
    plans = plan_modules(model, config)
    hashes = {file.name: sha256_file(file) for file in opened.files}
    inputs = calibrated(opened, model, plans, config, hashes, statistics, notice)
    return measure_errors(opened, config, choices, inputs=inputs, path=path, hashes=hashes, progress=progress)

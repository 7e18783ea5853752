"""The plan file: bits, block size and rank of every module, readable JSON with one module a line."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.config import BITS, BLOCK_SIZES, one_of, positive_int, reject_unknown
from loftq.errors import ConfigError, OutputError, SourceError

if TYPE_CHECKING:
    from loftq.plan.targets import ModulePlan

FORMAT = "loftq-plan"
VERSION = 1
QUANTIZER = ("codebook", "scale", "scale_dtype", "double_quant")
"""Settings of :class:`loftq.QuantSpec` that a plan's bytes and predictions hold for."""


@dataclass(frozen=True, order=True)
class Choice:
    """What a plan decides for one module: ``bits``, ``block_size`` and ``rank``.

    Raises:
        ConfigError: for a value that :class:`loftq.QuantSpec` or :class:`loftq.LoftQConfig` refuses.
    """

    bits: int
    block_size: int
    rank: int

    def __post_init__(self) -> None:
        one_of("bits", self.bits, BITS)
        one_of("block_size", self.block_size, BLOCK_SIZES)
        positive_int("rank", self.rank)


@dataclass(frozen=True)
class PlanFile:
    """A plan with what it was made from.

    Attributes:
        modules: module name -> :class:`Choice`.
        source: the model's name, and ``sha256`` of each of its files by file name.
        quantizer: the settings of :data:`QUANTIZER` that the plan's bytes hold for.
        target: what was asked for. rule: ``optimal`` or ``first-layers``.
        predicted: bytes, bits per weight, adapter parameters and objective of the plan and of the plans beside it.
        settings: of the error table. versions: of the packages. command: the exact command, where there was one.
    """

    modules: dict[str, Choice]
    source: dict[str, Any] = field(default_factory=dict)
    quantizer: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    rule: str = "optimal"
    predicted: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    def save(self, path: str | Path) -> None:
        """Write the file; it appears complete or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "modules"}
        rows = {name: dataclasses.asdict(choice) for name, choice in self.modules.items()}
        write_rows(path, {"format": FORMAT, "version": VERSION, **values}, rows)

    def check_source(self, sha256: Mapping[str, str]) -> None:
        """Refuse another model's weights; file name -> hex digest. A plan without digests fits any model.

        Raises:
            ConfigError: if a digest differs or a file is missing or new.
        """
        expected = self.source.get("sha256", {})
        if expected and dict(sha256) != expected:
            changed = sorted(n for n in {*sha256, *expected} if sha256.get(n) != expected.get(n))
            raise ConfigError(
                f"the plan was made for {self.source.get('name', 'another model')}, whose {changed[0]} differs from this "
                f"model's; plan again for this model"
            )


def load_plan(path: str | Path) -> PlanFile:
    """Read a plan file.

    Raises:
        SourceError: if there is none, or it is no plan file.
        ConfigError: for bits, a block size or a rank that does not exist, with the module's name.
    """
    path = Path(os.path.expanduser(path))
    values = read_rows(path, FORMAT, VERSION, "plan", "`loftq plan`")
    rows = values.pop("modules")
    for name in ("source", "quantizer", "target", "predicted", "settings", "versions"):
        if not isinstance(values.get(name, {}), dict):
            raise SourceError(f"{path} has {values[name]!r} as {name}, expected an object; plan again")
    reject_unknown(str(path), values, [f.name for f in dataclasses.fields(PlanFile)])
    modules = {}
    for name, row in rows.items():
        if not isinstance(row, dict):
            raise ConfigError(f"{path} gives {name} {row!r}, expected an object with bits, block_size and rank")
        known = [f.name for f in dataclasses.fields(Choice)]
        reject_unknown(f"{path}: {name}", row, known)
        missing = [key for key in known if key not in row]
        if missing:
            raise ConfigError(f"{path} lacks {missing[0]} of {name}, expected {', '.join(known)}; add it or plan again")
        try:
            modules[name] = Choice(**row)
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from None
    return PlanFile(modules, **values)


def apply_plan(
    plans: Mapping[str, ModulePlan], file: PlanFile | str | Path, *, source_sha256: Mapping[str, str] | None = None
) -> dict[str, ModulePlan]:
    """``plans`` with the bits, block sizes and ranks of a plan file, in the order of ``plans``.

    Args:
        plans: from :func:`loftq.plan.targets.plan_modules`.
        file: a plan, or where it is.
        source_sha256: digests of the model's files, to refuse a plan for another model.

    Raises:
        ConfigError: if the plan has a module that is not selected or lacks one that is, was made for another model, or
            for other settings of the quantizer.
        SourceError: see :func:`load_plan`.
    """
    plan = file if isinstance(file, PlanFile) else load_plan(file)
    if source_sha256 is not None:
        plan.check_source(source_sha256)
    unknown = [name for name in plan.modules if name not in plans]
    if unknown:
        raise ConfigError(
            f"the plan has {unknown[0]!r} (and {len(unknown) - 1} more) that is not among the {len(plans)} selected modules "
            f"such as {next(iter(plans), '(none)')!r}; select the modules as `loftq plan` did or plan again"
        )
    missing = [name for name in plans if name not in plan.modules]
    if missing:
        raise ConfigError(
            f"the plan lacks {missing[0]!r} (and {len(missing) - 1} more of {len(plans)} selected modules); select the "
            f"modules as `loftq plan` did or plan again"
        )
    result = {}
    for name, module in plans.items():
        for key, value in plan.quantizer.items():
            if key in QUANTIZER and getattr(module.spec, key) != value:
                raise ConfigError(
                    f"the plan was made for {key}={value}, but {name} has {key}={getattr(module.spec, key)}; give the same "
                    f"or plan again"
                )
        choice = plan.modules[name]
        spec = module.spec.replace(bits=choice.bits, block_size=choice.block_size)
        result[name] = dataclasses.replace(module, spec=spec, rank=choice.rank)
    return result


def write_rows(path: str | Path, head: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """A JSON object of ``head`` and, as ``modules``, ``rows`` with one a line; replaced in one step.

    Raises:
        OutputError: if it cannot be written.
    """
    path = Path(os.path.expanduser(path))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = json.dumps(dict(head), indent=1)[:-2] + ',\n "modules": {\n' + lines + "\n }\n}\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); choose another place") from None


def read_rows(path: Path, kind: str, version: int, what: str, origin: str) -> dict[str, Any]:
    """What :func:`write_rows` wrote, without ``format`` and ``version``.

    Raises:
        SourceError: if there is no such file, or it is another kind of file, or of a newer version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as a {what} ({error}); expected JSON written by {origin}") from None
    if not isinstance(values, dict) or values.pop("format", None) != kind:
        raise SourceError(f'{path} is no {what}, expected JSON with "format": "{kind}" written by {origin}')
    found = values.pop("version", None)
    if found != version:
        raise SourceError(f"{path} is a {what} of version {found!r}, expected {version}; make it again with {origin}")
    if not isinstance(values.get("modules"), dict) or not values["modules"]:
        raise SourceError(f"{path} lists no modules; make it again with {origin}")
    return values

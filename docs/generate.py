"""Write docs/cli.md and docs/api.md from the code; with ``--check``, exit 1 if they are out of date."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer.main

import loftq
from loftq.cli import app

DOCS = Path(__file__).resolve().parent
VERBS = {
    "train": "loftq.finetune.run",
    "TrainSettings": "loftq.finetune.settings",
    "DataSettings": "loftq.data.prepare",
    "TrainingRecord": "loftq.finetune.record",
    "load_run": "loftq.finetune.load",
    "evaluate_task": "loftq.finetune.measure",
    "perplexity": "loftq.evaluate.perplexity",
    "refine": "loftq.refine",
    "RefineSettings": "loftq.refine",
    "compare": "loftq.compare",
    "Comparison": "loftq.compare",
    "ablate": "loftq.ablate",
    "Ablation": "loftq.ablate",
    "Sweep": "loftq.ablate",
    "load_recipe": "loftq.recipes",
}
"""What programs call besides what `loftq` itself has, and where it is."""
NOTICE = "<!-- Written by docs/generate.py from the code: run `make docs` after a change. -->"
_TYPES = {str: "text", int: "integer", float: "number", Path: "path"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    pages = {"cli.md": cli_page(), "api.md": api_page()}
    stale = [name for name, text in pages.items() if not _same(DOCS / name, text)]
    if check and stale:
        print(f"docs/{' and docs/'.join(stale)} do not match the code; run `make docs`", file=sys.stderr)
        return 1
    for name in stale:
        (DOCS / name).write_text(pages[name], encoding="utf-8")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


# the command line


def cli_page() -> str:
    """Every verb with its arguments and options."""
    group: Any = typer.main.get_command(app)
    lines = [NOTICE, "", "# Command reference", "", str(group.help), ""]
    lines += [
        "Exit codes: 0 success, 1 an unexpected error, 2 a mistake in the input (one sentence on stderr), 130 interrupted.",
        "",
        "`loftq --version` shows the version, `loftq VERB --help` the text below.",
        "",
    ]
    lines += ["| verb | what it does |", "|---|---|"]
    found = list(_verbs(app, group))
    lines += [f"| [`{n}`](#loftq-{n.replace(' ', '-')}) | {_cell(_first_line(v))} |" for n, v, _ in found]
    for name, verb, command in found:
        lines += ["", *_verb(name, verb, command)]
    return "\n".join(lines) + "\n"


def _verbs(typer_app: typer.Typer, group: Any) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """(name, function, command) of every verb; those of a group as ``GROUP VERB``, after the others."""
    for command in typer_app.registered_commands:
        if command.callback is not None:
            name = command.callback.__name__
            yield name, command.callback, group.commands[name]
    for inner in typer_app.registered_groups:
        assert inner.typer_instance is not None
        for name, callback, command in _verbs(inner.typer_instance, group.commands[inner.name]):
            yield f"{inner.name} {name}", callback, command


def _verb(name: str, callback: Callable[..., Any], command: Any) -> list[str]:
    hints = typing.get_type_hints(callback, include_extras=True)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name in hints]
    shown = [p.name.upper() + ("..." if p.nargs == -1 else "") for p in arguments]
    usage = [f"loftq {name}", *(n if p.required else f"[{n}]" for n, p in zip(shown, arguments, strict=True))]
    usage += [f"{p.opts[0]} {_type(hints[p.name])[0].upper()}" for p in options if p.required]
    lines = [f"## loftq {name}", "", inspect.getdoc(callback) or "", ""]
    lines += ["```text", " ".join([*usage, "[OPTIONS]"]), "```"]
    if arguments:
        lines += ["", "| argument | type | meaning |", "|---|---|---|"]
        lines += [f"| `{p.name.upper()}` | {_type(hints[p.name])[0]} | {_cell(p.help)} |" for p in arguments]
    lines += ["", "| option | type | default | meaning |", "|---|---|---|---|"]
    for p in options:
        kind, info = _type(hints[p.name])
        help_text = p.help or ""
        shown = getattr(p, "show_default", None)
        names = ", ".join(f"`{name}`" for name in p.opts)
        if p.secondary_opts:
            names += " / " + ", ".join(f"`{name}`" for name in p.secondary_opts)
        if info is not None and info.min is not None:
            kind += f", at least {info.min:g}"
        default = "required" if p.required else shown if isinstance(shown, str) else _default(p.default)
        lines.append(f"| {names} | {kind} | {_cell(default)} | {_cell(help_text)} |")
    return lines


def _type(hint: Any) -> tuple[str, Any]:
    """A parameter's type in words, and Typer's description of it."""
    base, *metadata = typing.get_args(hint)
    choices = [a for a in typing.get_args(base) if a is not type(None)]
    if typing.get_origin(base) is not list and choices:
        base = choices[0]
    info = metadata[0] if metadata else None
    if typing.get_origin(base) is list:
        return f"{_TYPES[typing.get_args(base)[0]]}, repeatable", info
    return ("flag" if base is bool else _TYPES[base]), info


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else str(value)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


# the Python interface


def api_page() -> str:
    """Every public name: signature, description, arguments, errors."""
    lines = [NOTICE, "", "# Python interface", "", "Importable from `loftq`:", ""]
    names = sorted(loftq.__all__, key=str.lower)
    lines += _overview({name: _summary(name) for name in names})
    lines += ["", "What the verbs of the command line do, importable from the module named:", ""]
    found = {name: getattr(importlib.import_module(module), name) for name, module in VERBS.items()}
    lines += _overview({name: f"`{VERBS[name]}`: {_first_line(value)}" for name, value in found.items()})
    for name in names:
        lines += ["", *_entry(name)]
    for name, value in found.items():
        lines += ["", f"## {name}", "", f"`from {VERBS[name]} import {name}`", "", *_described(name, value)]
    return "\n".join(lines) + "\n"


def _overview(summaries: dict[str, str]) -> list[str]:
    lines = ["| name | what it is |", "|---|---|"]
    return lines + [f"| [`{name}`](#{name.lower()}) | {_cell(text)} |" for name, text in summaries.items()]


def _entry(name: str) -> list[str]:
    value = getattr(loftq, name)
    lines = [f"## {name}", ""]
    if name == "__version__":
        return [*lines, _summary(name)]
    if isinstance(value, dict):
        return [*lines, "```text", f"{name} = {value!r}", "```", "", _summary(name)]
    if isinstance(value, type) and issubclass(value, Exception):
        return [*lines, f"`{name}({value.__bases__[0].__name__})`", "", _summary(name)]
    return [*lines, *_described(name, value)]


def _described(name: str, value: Any) -> list[str]:
    lines = ["```text", _signature(name, value), "```", "", *_docstring(value)]
    if isinstance(value, type):
        members = list(_members(value))
        if members:
            lines += ["", "| member | what it does |", "|---|---|", *members]
    return lines


def _summary(name: str) -> str:
    value = getattr(loftq, name)
    if name == "__version__":
        return "The version of the installed package."
    if not callable(value):
        return _plain(_constant_description(name))
    return _first_line(value)


def _constant_description(name: str) -> str:
    """The string literal below a constant of ``loftq.config``."""
    body = ast.parse(inspect.getsource(loftq.config)).body
    for statement, after in itertools.pairwise(body):
        targets = [getattr(statement, "target", None), *getattr(statement, "targets", [])]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets) and isinstance(after, ast.Expr):
            return str(ast.literal_eval(after.value))
    raise LookupError(f"loftq.{name} has no description below it")


def _members(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if name.startswith("_") or not (inspect.isfunction(function) or isinstance(member, property)):
            continue
        shown = name if isinstance(member, property) else _signature(name, function, skip_first=True)
        yield f"| `{_cell(shown)}` | {_cell(_first_line(member))} |"


def _first_line(value: Any) -> str:
    text = inspect.getdoc(getattr(value, "__func__", value)) or ""
    return _plain(text.split("\n\n")[0].replace("\n", " "))


def _signature(name: str, value: Any, skip_first: bool = False) -> str:
    """The signature on one line, or one parameter a line where that is too long; annotations as written."""
    parameters = list(inspect.signature(value).parameters.values())
    if skip_first:
        parameters = parameters[1:]
    shown: list[str] = []
    keyword_only = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        text = f"{star}{p.name}"
        if p.annotation is not p.empty:
            text += f": {p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)}"
        if p.default is not p.empty:
            known = "..." if inspect.isfunction(p.default) else repr(p.default)  # whose address is another each time
            text += " = " + ("{}" if "factory" in known else known)
        shown.append(text)
    returns = "" if isinstance(value, type) else _returns(value)
    one_line = f"{name}({', '.join(shown)}){returns}"
    if len(one_line) <= 110 or skip_first:
        return one_line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in shown) + f"){returns}"


def _returns(function: Any) -> str:
    annotation = inspect.signature(function).return_annotation
    return "" if annotation is inspect.Signature.empty else f" -> {annotation}"


def _docstring(value: Any) -> list[str]:
    """A docstring as Markdown: paragraphs as they are, ``Args:`` and the like as lists."""
    lines: list[str] = []
    for block in (inspect.getdoc(value) or "").split("\n\n"):
        heading, *rest = block.split("\n")
        if heading.rstrip(":") in ("Args", "Attributes", "Raises") and rest:
            entries: list[str] = []
            for line in inspect.cleandoc("\n".join(["", *rest])).split("\n"):
                if line.startswith(" "):
                    entries[-1] += " " + line.strip()
                else:
                    entries.append(line)
            lines += [f"{heading}", ""]
            for entry in entries:
                names, _, text = entry.partition(": ")
                lines.append(f"- {', '.join(f'`{n.strip()}`' for n in names.split(','))}: {_plain(text)}")
        elif all(line.startswith("    ") for line in block.split("\n")):
            lines += ["```text", inspect.cleandoc(block), "```"]
        else:
            lines.append(_plain(re.sub(r"\n *", " ", block)))
        lines.append("")
    return lines[:-1]


def _plain(text: str) -> str:
    """Sphinx roles and double backquotes as Markdown code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


if __name__ == "__main__":
    sys.exit(main())

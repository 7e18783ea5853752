"""Where the folders and files of a run lie, so that they are found from any directory and after a move together."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from loftq.evaluate.tokens import is_stored

Places = Mapping[str, Mapping[str, str]]
"""Name as typed -> ``absolute``, its path when the run began, and ``relative``, the way there from the run's folder."""


def places_of(run: Path, names: Collection[str | None]) -> dict[str, dict[str, str]]:
    """Where those of the names lie that are folders or files here; hub ids are not among them."""
    return {name: _places(run, name) for name in names if name is not None and is_local(name)}


def is_local(name: str) -> bool:
    """Whether a name leads to a folder or file here, to several by a ``*``, or to token ids in a file."""
    path = os.path.expanduser(name)
    if is_stored(path):
        path = path.rpartition(":")[0]
    return os.path.exists(path) or ("*" in path and bool(glob.glob(path)))


def absolute(name: str) -> str:
    """A local name as a path from the root, links in it kept; any other, such as a hub id, as it is."""
    return os.path.abspath(os.path.expanduser(name)) if is_local(name) else name


def candidates(run: Path, name: str, places: Places) -> list[str]:
    """Where to look for what a run calls ``name``, in this order: at its absolute place, where it lay as seen from the run's
    folder, and by its name from the working directory. A hub id, or a name in a record without places, is itself.

    A name that leads to the absolute place is given as it is, the shorter to read.
    """
    kept = _kept(run, name, places)
    return list(dict.fromkeys([name if _real(path) == _real(name) else path for path in kept] + [name]))


def locate(run: Path, name: str, places: Places) -> str:
    """The first of the candidates that is here, or else the name itself."""
    return next((place for place in candidates(run, name, places) if is_local(place)), name)


def is_same(run: Path, known: str, places: Places | None, wanted: str) -> bool:
    """Whether a run's name for a folder or file and a new one mean the same, however they are spelled.

    ``places`` is ``None`` for a run that was begun before they were recorded: then the same words are the same thing.
    """
    if places is None:
        return known == wanted or (is_local(known) and _real(known) == _real(wanted))
    if known not in places:
        return known == wanted
    return _real(wanted) in {_real(path) for path in _kept(run, known, places)}


def _places(run: Path, name: str) -> dict[str, str]:
    found = {"absolute": absolute(name)}
    with contextlib.suppress(ValueError):  # on another drive
        # `..` leads up from where a link points to, not from the link
        found["relative"] = os.path.relpath(_real(name), _real(str(run)))
    return found


def _kept(run: Path, name: str, places: Places) -> list[str]:
    known = places.get(name, {})
    found = [known["absolute"]] if "absolute" in known else []
    if "relative" in known:
        found.append(os.path.normpath(os.path.join(_real(str(run)), known["relative"])))
    return found


def _real(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))

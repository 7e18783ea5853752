"""Statistics that are collected once and kept in a file for many quantizations of one model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loftq.calibrate.choose import collect_statistics
from loftq.calibrate.statistics import Statistics
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import Source, sha256_file
from loftq.config import LoftQConfig
from loftq.solver.methods import method_named


def kept_statistics(path: Path, source: Source, config: LoftQConfig, methods: Iterable[str]) -> Statistics:
    """The statistics in a file, or new ones, which are saved there, if it is absent or lacks the gradients of a method.

    Args:
        path: the file; its name or folder must tell calibrations apart. source: the full-precision model.
        config: calibration text, windows, seed and target modules. methods: what the statistics are for.

    Raises:
        SourceError, ConfigError: the text cannot be read, or does not fit the model; the file is another model's.
    """
    fisher = any(method_named(name).needs_gradients for name in methods)
    if path.exists():
        found = Statistics.load(path, {f.name: sha256_file(f) for f in source.files})
        if not fisher or any(s.fisher_rows is not None for s in found.values()):
            return found
    has_head = meta_model(source.config()).get_output_embeddings() is not None
    found = collect_statistics(source, config, fisher=fisher and has_head)
    found.save(path)
    return found

"""Statistics of all layers at once, of a checkpoint or of a live model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.calibrate.backward import StreamedGradients
from loftq.calibrate.batches import Batch, make_batches
from loftq.calibrate.experts import ExpertCollector, check_experts
from loftq.calibrate.forward import StreamedForward
from loftq.calibrate.moments import Rows, unseen
from loftq.calibrate.statistics import Statistics
from loftq.calibrate.streamed import Advance
from loftq.calibrate.text import CalibrationTokens
from loftq.calibrate.trace import Collector, check_targets, in_features
from loftq.checkpoint.source import Source, open_source, sha256_file
from loftq.config import positive_int
from loftq.errors import ConfigError
from loftq.solver.importance import InputStatistics


def describe(tokens: CalibrationTokens, full: bool, gradients: int = 0) -> dict[str, Any]:
    """What statistics say of the text they come from."""
    windows, length = tokens.ids.shape
    return {
        "name": tokens.name,
        "sha256": tokens.sha256,
        "windows": windows,
        "length": length,
        "tokens": int(tokens.mask.sum()),
        "full": full,
        "gradients": min(gradients, windows),
    }


def collect(
    source: str | Path | Source,
    targets: Collection[str],
    tokens: CalibrationTokens,
    *,
    full: bool = True,
    gradients: int = 0,
    fisher: bool = False,
    experts: Collection[str] = (),
    batch_tokens: int = 2048,
    spill_bytes: int = 2_000_000_000,
    progress: bool | Advance = True,
) -> Statistics:
    """Statistics of the inputs of every target in the full-precision model, one block of it in memory at a time.

    Args:
        source: folder with safetensors, ``.gguf`` file, hub id, or an opened source.
        targets: names of linear layers.
        tokens, full, batch_tokens, spill_bytes: see :class:`StreamedForward`.
        gradients: on how many windows to run the backward pass as well, for ``loftq-data``; see
            :class:`loftq.calibrate.backward.StreamedGradients`. Second moments are then full.
        experts: parameters with the experts of a layer; every expert's statistics are under the parameter's name and the
            expert's number.
        fisher: with the gradients the diagonal Fisher information too, for LQ-LoRA.
        progress: a bar on a terminal, a plain line now and then elsewhere; or a callable ``(name, tokens)``.

    Raises:
        SourceError, ConfigError, OutputError: see :class:`StreamedForward`.
    """
    opened = open_source(source) if isinstance(source, (str, Path)) else source
    layers: dict[str, InputStatistics] = {}
    forward: StreamedForward | StreamedGradients
    positive_int("gradients", gradients, 0)
    if fisher and not gradients:
        raise ConfigError("fisher was asked for with gradients=0, expected windows to run the backward pass on")
    if gradients:
        forward = StreamedGradients(
            opened, targets, tokens, windows=gradients, fisher=fisher, experts=experts, spill_bytes=spill_bytes
        )
        full = True
    else:
        forward = StreamedForward(
            opened, targets, tokens, full=full, batch_tokens=batch_tokens, spill_bytes=spill_bytes, experts=experts
        )
    with forward, _reporter(progress, forward.work) as forward.progress:
        for group in forward.groups():
            layers.update(group.by_name())
    layers = {name: layers[name] for name in [*targets, *(n for n in layers if n not in set(targets))]}
    return Statistics(layers, describe(tokens, full, gradients), {f.name: sha256_file(f) for f in opened.files})


@torch.no_grad()
def collect_from_model(
    model: nn.Module,
    targets: Collection[str],
    tokens: CalibrationTokens,
    *,
    full: bool = True,
    experts: Collection[str] = (),
    batch_tokens: int = 2048,
    progress: bool | Advance = True,
) -> Statistics:
    """:func:`collect` for a live transformers model, on the device and in the dtype that it has.

    Raises:
        SourceError, ConfigError: see :class:`StreamedForward`.
    """
    modules = check_targets(model, targets)
    batches = make_batches(model, tokens, batch_tokens)
    device = next(model.parameters()).device
    collector = Collector(modules, full=full)
    of_experts = ExpertCollector(check_experts(model, experts), full=full)
    was_training = model.training
    model.eval()
    try:
        with _reporter(progress, sum(batch.tokens for batch in batches)) as advance:
            for batch in batches:
                own = Rows(batch.masks_for("")[1].to(device))
                with _rows_of(model, batch, device) as rows, collector.run(rows), of_experts.run(own):
                    model(**{name: value.to(device) for name, value in batch.inputs.items()})
                advance("tokens", batch.tokens)
    finally:
        model.train(was_training)
    layers: dict[str, InputStatistics] = {}
    for names, statistics in collector.results():
        layers.update(dict.fromkeys(names, statistics))
    layers.update({name: unseen(in_features(m)) for name, m in modules.items() if name not in layers})
    for name, (_, each) in of_experts.results().items():
        layers.update({f"{name}.{expert}": found for expert, found in enumerate(each)})
    return Statistics(layers, describe(tokens, full))


@contextmanager
def _rows_of(model: Any, batch: Batch, device: torch.device) -> Iterator[Callable[[str], Rows]]:
    """Which rows are tokens, by the name of the layer: the encoder's, or those of the decoder, which reads its output."""
    encoded: list[Tensor] = []

    def rows(name: str) -> Rows:
        encoder, own = batch.masks_for(name)
        return Rows(own.to(device), None if encoder is None else encoder.to(device), [own, *encoded])

    if batch.encoder_mask is None:
        yield rows
        return
    handle = model.get_encoder().register_forward_hook(lambda module, args, output: encoded.append(output[0]))
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def _reporter(progress: bool | Advance, total: int) -> Iterator[Advance]:
    if callable(progress):
        yield progress
    else:
        from loftq.report.progress import bar

        with bar(total, "calibrating", "tokens", show=progress) as advance:
            yield advance

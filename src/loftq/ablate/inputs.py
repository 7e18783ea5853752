"""Reading everything that a sweep will need, so that a mistake shows before hours of work and leaves nothing behind."""

from __future__ import annotations

from torch import Tensor, nn

from loftq.ablate.settings import Ablation
from loftq.calibrate.choose import calibrated
from loftq.calibrate.text import SELF
from loftq.checkpoint.source import Source
from loftq.data.prepare import prepare
from loftq.errors import ConfigError
from loftq.evaluate.models import load_tokenizer
from loftq.evaluate.perplexity import check_window
from loftq.evaluate.task import check_metrics
from loftq.evaluate.tokens import stored_tokens, text_tokens
from loftq.hub.adapter import task_type
from loftq.plan.targets import plan_modules


def check_inputs(settings: Ablation, source: Source, model: nn.Module) -> Tensor | None:
    """The ids of the text to measure on, ``None`` without one, after reading it, the calibration texts and the data.

    Raises:
        ConfigError, SourceError: something is missing, damaged, or does not fit the model.
    """
    cells = set(settings.cells().values())
    for cell in cells:
        plans = plan_modules(model, settings.config(cell, model))
    for text in sorted({cell.calibration for cell in cells if cell.calibration not in (None, SELF)}, key=str):
        config = settings.calibrated_on(str(text)).replace(method="qera-approx")  # which asks for no gradients
        calibrated(source, model, plans, config, {}, None, lambda sentence: None)
    if settings.train is not None and settings.train.eval_data is not None:
        check_metrics(settings.train.data.task, settings.train.metric_names)
        for data in (settings.train.data, settings.train.eval_data):
            if stored_tokens(data.data) is None:
                labels = data.labels if data.task == "classification" else None
                prepare(data, load_tokenizer(settings.model), source.config(), labels=labels)
    if settings.text is None:
        return None
    name = type(model).__name__
    if task_type(name) != "CAUSAL_LM":
        raise ConfigError(
            f"a text was given to measure perplexity on, but {settings.model} is a {name}, which predicts no next token; "
            f"leave the text out"
        )
    if settings.window is not None:
        check_window(source.config(), settings.window)
    return text_tokens(settings.text, settings.model, settings.max_tokens)

"""Where the curve of a run goes besides its record: TensorBoard, Trackio, Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loftq.errors import ConfigError, first_line
from loftq.finetune.folder import LOGS

_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_reporter(name: str) -> None:
    """A :class:`ConfigError` if the package of a reporter is not installed."""
    if name != "none":
        try:
            importlib.import_module(_MODULES[name])
        except ImportError:
            raise ConfigError(f"report_to is {name}, which is not installed; pip install {name}") from None


def reporter(name: str, run: Path, notice: Callable[[str], None]) -> TrainerCallback:
    """The callback that passes the curve on, which never ends a run.

    Raises:
        ConfigError: its package is not installed, or refuses to start.
    """
    from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

    check_reporter(name)
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # the Trainer's own place goes with its checkpoints
            return Reporter(name, TensorBoardCallback(SummaryWriter(str(run / LOGS))), notice)
        return Reporter(name, {"trackio": TrackioCallback, "wandb": WandbCallback}[name](), notice)
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise ConfigError(f"report_to is {name}, which does not start ({first_line(error)}); choose none") from None


class Reporter(TrainerCallback):
    """Another callback, left alone once it fails: a network that is down costs the curve there, not the run."""

    def __init__(self, name: str, callback: TrainerCallback, notice: Callable[[str], None]) -> None:
        self.name = name
        self.callback: TrainerCallback | None = callback
        self.notice = notice

    def pass_on(self, event: str, *args: Any, **kwargs: Any) -> Any:
        if self.callback is None:
            return None
        try:
            return getattr(self.callback, event)(*args, **kwargs)
        except Exception as error:  # another program's, of any kind
            self.callback = None
            self.notice(
                f"{self.name} failed ({first_line(error)}); the run goes on without it, its curve is in training.json"
            )
            return None


def _passing(event: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self.pass_on(event, *args, **kwargs)


for _event in (name for name in vars(TrainerCallback) if name.startswith("on_")):
    setattr(Reporter, _event, _passing(_event))

"""What ran, where, and how much memory it took."""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("loftq", "torch", "transformers", "peft", "safetensors", "numpy", "numba")

TRAINING_PACKAGES = ("accelerate", "datasets", "tokenizers", "scikit-learn", "rouge_score")
"""Packages that decide what a fine-tuning or its metrics give beside those of :func:`versions`."""


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, ``more`` among them, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """Processor, cores and operating system, and the GPU where there is one."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": name, "threads": torch.get_num_threads(), "os": f"{platform.system()} {platform.machine()}", **gpu}


class PeakMemory:
    """Peak resident memory of this process since :meth:`start`, in bytes.

    Linux can forget the high-water mark; elsewhere the value is the peak since the process began.
    """

    def start(self) -> PeakMemory:
        if (cuda := self._cuda()) is not None:
            cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    @staticmethod
    def _cuda() -> Any:
        """``torch.cuda`` if this process uses a GPU already: to ask it anything would begin that, and take memory there."""
        torch = sys.modules.get("torch")
        return torch.cuda if torch is not None and torch.cuda.is_initialized() else None

    def gpu(self) -> dict[str, int]:
        """``peak_gpu_memory_bytes``: of this process's tensors on the current GPU; empty without one."""
        cuda = self._cuda()
        return {} if cuda is None else {"peak_gpu_memory_bytes": cuda.max_memory_allocated()}

    def peak(self) -> int:
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        try:
            import resource
        except ImportError:  # Windows
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

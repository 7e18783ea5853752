"""SQuAD, ANLI-style classification and XSum from quantization to a measured run, with small models on small samples.

    python benchmarks/finetune/tasks.py                       # the three tasks at 4 and 2 bits: half an hour on two busy cores
    python benchmarks/finetune/tasks.py squad --bits 4        # one of them
    python benchmarks/finetune/tasks.py --list                # the command lines alone
    python benchmarks/finetune/tasks.py --check               # only compare docs/finetuning.md with the results

What is shown is that the whole way works and moves each task's metrics up, not what a model can reach: the samples have
a thousand rows at most, and the models were made for sentence embeddings.

| task | model | trained on | measured on |
|---|---|---|---|
| squad | all-MiniLM-L6-v2 | 600 questions of 20 articles of the train split | 100 questions of the dev split |
| anli | all-MiniLM-L6-v2 | 960 pairs | 200 pairs |
| xsum | two halves of 3 layers of it, put together by `EncoderDecoderModel` | 800 documents | 50 documents |

ANLI itself is not among the local data. The pairs are made from SQuAD's paragraphs, with ANLI's columns and classes: the
premise is two neighbouring sentences; the hypothesis is one of them (entailment), one of them with ``not`` put behind its
first auxiliary verb (contradiction), or a sentence of another article, every second one negated as well (neutral). So
neither the hypothesis alone nor its likeness to the premise alone tells the classes apart: the best guess from either is
right for two pairs of three. In so few steps MiniLM learns the negation, and no more (67.5 % after 236 steps of 16 pairs).
The cross-attention of the encoder-decoder and what stands before its output are new and
random; adapters alone are trained, as everywhere here.

The commands name models and data by links in ``work``, where an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import DATA, RESULTS, between, minilm_dir, save  # noqa: E402 - beside this folder, which is no package

WORK = HERE / "work"  # not kept in the repository
COMMAND = "python benchmarks/finetune/tasks.py"
PAGE = HERE.parent.parent / "docs" / "finetuning.md"
BEGIN, END = "<!-- finetune tasks -->", "<!-- end of finetune tasks -->"
RECORD = RESULTS / "finetune_tasks.json"
BITS = (4, 2)


@dataclass(frozen=True)
class Task:
    """What ``loftq train`` is told beside the model and the folders.

    Attributes:
        model: folder in ``work``. paper: the model that stands in its place in the paper's tables.
        options: of the task and its data. size: how much is trained and measured. metrics: what must rise.
    """

    model: str
    paper: str
    options: str
    size: str
    metrics: tuple[str, ...]


TASKS = {
    "squad": Task(
        "minilm",
        "microsoft/deberta-v3-base",
        "--task qa --data squad --eval-split validation --max-length 160 --doc-stride 48",
        "--limit 600 --eval-limit 100 --epochs 1 --batch-size 8 --lr 1e-3",
        ("exact_match", "f1"),
    ),
    "anli": Task(
        "minilm",
        "microsoft/deberta-v3-base",
        "--task classification --data anli --eval-split validation --labels entailment,neutral,contradiction --max-length 128",
        "--limit 960 --eval-limit 200 --epochs 1 --batch-size 16 --lr 1e-3",
        ("accuracy",),
    ),
    "xsum": Task(
        "minilm-to-minilm",
        "facebook/bart-large",
        "--task summarization --data xsum --eval-split validation --max-length 64 --max-target-length 40 "
        "--max-new-tokens 40",
        "--limit 800 --eval-limit 50 --epochs 2 --batch-size 8 --eval-batch-size 25 --lr 2e-3",
        ("rouge1", "rouge2", "rougeL"),
    ),
}


def commands(name: str, bits: int, *, model: str | None = None, size: str | None = None, seed: int = 0) -> list[str]:
    """The three command lines of a task; with another ``model`` those for it."""
    task = TASKS[name]
    model = task.model if model is None else model
    folder, run = f"{Path(model).name}-{bits}bit", f"{name}-{bits}bit"
    seeded = f" --seed {seed}" if seed else ""
    return [
        f"loftq quantize {model} --bits {bits} --rank 16 --out {folder}",
        f"loftq train {run} --init-from {folder} {task.options} {task.size if size is None else size}{seeded}",
        f"loftq evaluate {run} --json",
    ]


def run(name: str, bits: int, work: Path, **changes: Any) -> dict[str, Any]:
    """Quantize, train and measure in ``work``; what :func:`prepare` has put there is not changed."""
    lines = commands(name, bits, **changes)
    seconds, output = [], ""
    for line in lines:
        started = time.perf_counter()
        call = [sys.executable, "-c", "from loftq.cli import main; main()", *shlex.split(line)[1:]]
        output = subprocess.run(call, cwd=work, stdout=subprocess.PIPE, text=True, check=True).stdout
        seconds.append(round(time.perf_counter() - started, 1))
    record = json.loads((work / shlex.split(lines[1])[2] / "training.json").read_text(encoding="utf-8"))
    return {
        "task": name,
        "bits": bits,
        "before": record["before"],
        "after": json.loads(output)["metrics"],
        "steps": len(record["curve"]),
        "trainable": record["trainable"],
        "peak_memory_bytes": record["timing"]["peak_memory_bytes"],
        "commands": lines,
        "seconds": seconds,
    }


def prepare(work: Path) -> None:
    """Models and data under the names that the commands have for them."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "minilm").exists():
        (work / "minilm").symlink_to(minilm_dir())
    if not (work / "minilm-to-minilm" / "tokenizer.json").exists():
        encoder_decoder(work / "minilm", work / "minilm-to-minilm")
    questions = {"train": "train20.json", "validation": "dev_xquad_en.json"}
    for split, file in questions.items():
        rows = squad_rows(DATA / "squad" / file)
        _write(work / "anli" / f"{split}.jsonl", pairs(rows, seed=split))
        random.Random(0).shuffle(rows)  # a few hundred of all articles, not of the first
        _write(work / "squad" / f"{split}.jsonl", rows)
    documents = [json.loads(line) for line in (DATA / "xsum" / "test1000.jsonl").open(encoding="utf-8")]
    _write(work / "xsum" / "train.jsonl", documents[:900])
    _write(work / "xsum" / "validation.jsonl", documents[900:])


def encoder_decoder(encoder: Path, folder: Path, layers: int = 3) -> None:
    """An encoder-decoder of an encoder's first layers, twice; cross-attention and output transform are random."""
    import torch
    from transformers import AutoTokenizer, EncoderDecoderModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # no tables of what is new and what is left out
    torch.manual_seed(0)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        str(encoder), str(encoder), encoder_num_hidden_layers=layers, decoder_num_hidden_layers=layers
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


def squad_rows(file: Path) -> list[dict[str, Any]]:
    """Questions with their paragraphs, in the columns that the data set has on the hub."""
    rows = []
    for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = {key: [a[key] for a in question["answers"]] for key in ("text", "answer_start")}
                row = {"id": question["id"], "title": article.get("title"), "context": paragraph["context"]}
                rows.append({**row, "question": question["question"], "answers": answers})
    return rows


_AUXILIARY = re.compile(r"\b(is|was|were|are|has|have|had|can|could|will|would|may|must|should)\b")


def pairs(rows: list[dict[str, Any]], seed: str) -> list[dict[str, str]]:
    """Premise, hypothesis and label, in any order; see the module's text for how they are made."""
    chance = random.Random(seed)
    articles = {row["context"]: row["title"] for row in rows}
    couples = [(*couple, title) for context, title in articles.items() for couple in _couples(context)]
    found = []
    for number, (premise, sentence, title) in enumerate(couples):
        other = chance.choice([s for _, s, its_title in couples if its_title != title])
        hypotheses = {
            "entailment": sentence,
            "neutral": _negated(other) if number % 2 else other,
            "contradiction": _negated(sentence),
        }
        found += [{"premise": premise, "hypothesis": text, "label": label} for label, text in hypotheses.items()]
    chance.shuffle(found)
    return found


def _negated(sentence: str) -> str:
    return _AUXILIARY.sub(r"\1 not", sentence, count=1)


def _couples(context: str) -> Iterator[tuple[str, str]]:
    """(two neighbouring sentences, one of them that can be negated), each sentence in one couple at most."""
    sentences = [s for s in re.split(r"(?<=[a-z)]\.) (?=[A-Z])", context) if 30 <= len(s) <= 150]
    for i in range(0, len(sentences) - 1, 2):
        both = sentences[i : i + 2]
        usable = [s for s in both if _AUXILIARY.search(s) and not re.search(r"\bnot\b|n't", s)]
        if usable:
            yield " ".join(both), usable[i // 2 % len(usable)]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def markdown() -> str:
    """The results as the page shows them."""
    results = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = ["| task | bits | metric | before | after | steps |", "|---|---:|---|---:|---:|---:|"]
    for row in results["rows"]:
        for metric in TASKS[row["task"]].metrics:
            numbers = [f"{row[when][metric]:.1f} ± {row[when][f'{metric}_se']:.1f}" for when in ("before", "after")]
            lines.append(f"| {row['task']} | {row['bits']} | {metric} | {' | '.join(numbers)} | {row['steps']} |")
    machine, slowest = results["machine"], max(sum(row["seconds"]) for row in results["rows"])
    lines += ["", f"Each row took {slowest / 60:.0f} minutes at most on {machine['cpu']}; `{COMMAND}`."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}; all by default")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help=f"some of {BITS}, with commas")
    parser.add_argument("--list", action="store_true", help="print the commands, here and with the paper's models")
    parser.add_argument("--check", action="store_true", help="only compare the page with the results")
    chosen = parser.parse_args(arguments)
    if chosen.check:
        return between(PAGE, (BEGIN, END), markdown(), check=True)
    unknown = [name for name in chosen.tasks if name not in TASKS]
    if unknown:
        parser.error(f"no task {unknown[0]}; expected {', '.join(TASKS)}")
    if not set(chosen.bits.split(",")) <= set(map(str, BITS)):
        parser.error(f"bits is {chosen.bits}, expected some of {BITS}")
    cells = [(name, int(bits)) for name in chosen.tasks or TASKS for bits in chosen.bits.split(",")]
    if chosen.list:
        for name, bits in cells:
            print("\n".join([*commands(name, bits), *commands(name, bits, model=TASKS[name].paper)]))
        return 0
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not here")
        return 0
    prepare(WORK)
    order = [(name, bits) for name in TASKS for bits in BITS]
    known = json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if RECORD.exists() else []
    for name, bits in cells:
        row = next((r for r in known if r["commands"] == commands(name, bits)), None)
        if row is None:
            row = run(name, bits, WORK)
            known = [r for r in known if (r["task"], r["bits"]) != (name, bits)] + [row]
            known.sort(key=lambda r: order.index((r["task"], r["bits"])))
            save(RECORD.stem, COMMAND, {"rows": known})
        moved = ", ".join(f"{m} {row['before'][m]:.1f} -> {row['after'][m]:.1f}" for m in TASKS[name].metrics)
        print(f"{name}, {bits} bits: {moved} ({sum(row['seconds']):.0f} s)", flush=True)
    return between(PAGE, (BEGIN, END), markdown(), check=False)


if __name__ == "__main__":
    raise SystemExit(main())

"""The documentation is true: programs run, commands parse, links resolve, generated pages match, layers import downwards.

A fenced block whose first line is ``# runnable`` runs here: Python blocks of a page in order in one namespace, bash blocks
line by line through the command line itself, or the launcher that they name, all in an empty folder. A YAML block whose
first line is ``# NAME.yaml`` is written to that file. A page that links to the
tutorial's "A model to work on" finds that model there.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main

import loftq
from loftq.cli import app
from loftq.config import BITS, CODEBOOKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
RUNNABLE = "# runnable\n"
SHELLS = ("bash", "sh")
# Programs that start loftq in several processes, and the modules that they are.
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}
SLOW = {"cluster.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def command_lines(text: str) -> list[str]:
    """The lines of a bash block, continued ones joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def loftq_arguments(line: str) -> list[str] | None:
    """What follows ``loftq`` in a command line, or ``None`` for another program."""
    words = shlex.split(line, comments=True)
    if words and words[0] in LAUNCHERS and "loftq.cli" in words:
        words = ["loftq", *words[words.index("loftq.cli") + 1 :]]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words or words[0].rpartition("/")[2] != "loftq":
        return None
    stop = next((i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";")), len(words))
    return words[1:stop]


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every verb by name; those of a group as ``GROUP VERB``."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {verb}": c for verb, c in inner.items()}
    return found


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb that a command line begins with, one word or two, and the rest of it."""
    two = " ".join(words[:2])
    return (two, words[2:]) if two in commands() else (words[0], words[1:])


def parse(arguments: list[str]) -> None:
    """Parse a command line without running it; Typer's error for what does not exist."""
    if arguments[0] in ("--version", "--help", "-h"):
        return
    verb, rest = split_verb(arguments)
    assert verb in commands(), f"loftq has no verb {verb}"
    if not {"--help", "-h"} & set(rest):
        commands()[verb].make_context(verb, list(rest))


def run_bash(text: str) -> None:
    for line in command_lines(text):
        if line.split()[0] in LAUNCHERS:
            launch(shlex.split(line))
            continue
        arguments = loftq_arguments(line)
        if arguments is not None:
            app(arguments, standalone_mode=False)
            continue
        program, script, *rest = shlex.split(line)
        assert (program, script) == ("python", "examples/finetune.py"), f"no way to run {line!r}"
        finetune()["main"](rest)


def launch(words: list[str]) -> None:
    """A launcher's command line, with the sources under test and without a GPU."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PET_MASTER_PORT": port}
    command = [sys.executable, "-m", LAUNCHERS[words[0]], *words[1:]]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-3000:]}"


def finetune() -> dict:
    return runpy.run_path(str(ROOT / "examples" / "finetune.py"))


def write_tiny_model() -> None:
    """``tiny-model`` and ``my-text.txt``, as the tutorial's program writes them."""
    tutorial = [text for language, text in blocks(ROOT / "docs" / "tutorial.md") if language == "python"]
    exec(next(text for text in tutorial if "tiny-model" in text), {"__name__": "tutorial"})


def runnable_pages() -> list:
    pages = [p for p in PAGES if RUNNABLE in p.read_text(encoding="utf-8")]
    return [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in SLOW else []) for p in pages]


@pytest.mark.parametrize("page", runnable_pages())
def test_runnable_blocks(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": page.stem}
    if "](tutorial.md#a-model-to-work-on)" in page.read_text(encoding="utf-8"):
        write_tiny_model()
    for language, text in blocks(page):
        if language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", text)):
            Path(name[1]).write_text(text, encoding="utf-8")
        if text.startswith(RUNNABLE):
            assert language in ("python", "bash"), f"a runnable block of {page.name} is {language!r}"
            if language == "bash":
                run_bash(text)
            else:
                exec(compile(text, f"{page.name}: {text.splitlines()[1][:40]}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page):
    for language, text in blocks(page):
        if language in SHELLS:
            for line in command_lines(text):
                arguments = loftq_arguments(line)
                if arguments is not None:
                    parse(arguments)
        elif language == "python":
            compile(text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_inline_commands_name_what_exists(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    options = {name for verb in commands().values() for p in verb.params for name in (*p.opts, *p.secondary_opts)}
    for code in re.findall(r"`loftq ([^`]+)`", prose):
        verb, rest = split_verb(shlex.split(code))
        assert verb in {*commands(), "VERB", "--version", "--help"}, f"`loftq {code}` names no verb"
        unknown = [w for w in rest if w.startswith("-") and w.partition("=")[0] not in {*options, "--help", "-h"}]
        assert not unknown, f"`loftq {code}` names no option of loftq: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {slug(h) for h in headings}, f"{page.name} links to {target}, which is no heading"


# What the commands that are not runnable as they stand name, and what the tests put in its place.
STAND_INS = {
    "MODEL": "tiny-model",
    "path/or/hub-id": "tiny-model",
    "microsoft/deberta-v3-base": "deberta",
    "facebook/bart-large": "bart",
    "rajpurkar/squad": "squad",
    "facebook/anli": "anli",
    "EdinburghNLP/xsum": "xsum",
}
# Options whose values are for models of another size, and what suits one of a few thousand weights.
SMALL = {"--rank": "8", "--max-new-tokens": "4", "--num-beams": "2"}
# Commands that need what no machine has by itself: a cluster.
ELSEWHERE = ("--address",)
# What a command with such an option is given besides, so that its data are here.
BESIDES = {
    "--lm-eval": ["--include-path", "own-tasks"],
    "--seeds": [
        "--local",
        "sst2-rows",
        "--model",
        "deberta",
        "--set",
        "training.epochs=1",
        "--set",
        "quantization.rank=8",
    ],
}
OWN_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: own-tasks/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def other_commands() -> list:
    """The shell blocks with commands of ours that do not run as they stand, as far as they can with something in place."""
    found = []
    for page in PAGES:
        texts = [text for language, text in blocks(page) if language in SHELLS and not text.startswith(RUNNABLE)]
        for number, text in enumerate(texts):
            known = [words for line in command_lines(text) if (words := loftq_arguments(line)) is not None]
            known = [words for words in known if not set(words) & set(ELSEWHERE)]
            if known:
                found.append(pytest.param(known, id=f"{page.name}-{number}"))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model of every kind that the pages name, and a few rows for each task."""
    import transformers as tf

    from letters import letters
    from tiny import tiny_model
    from words import write_rows

    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        write_tiny_model()
        Path("held-out.txt").write_text("There was once a large model that forgot what it had read. " * 60, "utf-8")
        loftq.quantize_checkpoint("tiny-model", "my-model-2bit", loftq.LoftQConfig(bits=2, rank=8), progress=False)
        for name, kind in {"deberta": "deberta-v2", "bart": "bart", "minilm": "bert"}.items():
            config = tiny_model(kind).config
            config.update({"vocab_size": len(letters()), "max_position_embeddings": 512, "pad_token_id": 0})
            config.update({"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2} if name == "bart" else {})
            torch.manual_seed(0)
            auto = tf.AutoModelForSeq2SeqLM if name == "bart" else tf.AutoModel
            auto.from_config(config).save_pretrained(name)
            letters(pair=name != "bart").save_pretrained(name)
        programs = [text for language, text in blocks(ROOT / "docs" / "finetuning.md") if language == "python"]
        exec(next(text for text in programs if "minilm-to-minilm" in text), {})
        rows = {
            "my-data": {"question": "1+1=", "answer": "2"},
            "squad": {
                "context": "It was in Rome.",
                "question": "Where?",
                "answers": {"text": ["in Rome"], "answer_start": [7]},
            },
            "anli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
            "xsum": {"document": "It rains all day.", "summary": "It rains."},
        }
        for name, row in rows.items():
            Path(name).mkdir()
            for split in ("train", "validation", "train_r1+train_r2+train_r3", "dev_r1"):
                if name == "anli" or split in ("train", "validation"):
                    write_rows(Path(name) / f"{split}.jsonl", [row] * 2)
        for split in ("train", "validation"):
            Path("sst2-rows").mkdir(exist_ok=True)
            write_rows(
                Path("sst2-rows") / f"{split}.jsonl", [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}]
            )
        Path("own-tasks").mkdir()
        write_rows(
            Path("own-tasks/questions.jsonl"),
            [{"question": "1+1=", "choices": ["2", "3"], "answer": n} for n in (0, 1)],
        )
        for name in ("arc_easy", "hellaswag"):
            Path(f"own-tasks/{name}.yaml").write_text(OWN_TASK.format(name=name), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("lines", other_commands())
def test_other_commands_run(lines, place, tmp_path, monkeypatch, capsys):
    """With small models and data in place of those they name."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for number, words in enumerate(lines):
        words = [*words, *(more for option, given in BESIDES.items() if option in words for more in given)]
        words = [STAND_INS.get(word, word) for word in words]
        if "--lm-eval" in words:  # on a run that no command of the block has made
            words = ["my-model-2bit" if word == "my-run" else word for word in words]
        words = [SMALL.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        for option in ("--out", *(["train"] if words[0] == "train" else [])):
            if option in words and (made := words[words.index(option) + 1]) != "OUT":
                shutil.rmtree(made, ignore_errors=True)
        words = [f"out-{number}" if word == "OUT" else word for word in words]
        app(words, standalone_mode=False)


def messages() -> list[str]:
    """Every text of the sources, with … for what is filled in."""
    found = []
    for file in (ROOT / "src" / "loftq").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_of_the_training_section_are_real():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = page.partition("## Training\n")[2].partition("\n## ")[0]
    quoted = [m for line in section.splitlines() if line.startswith("### ") for m in re.findall(r"`([^`]+)`", line)]
    assert len(quoted) > 30
    known = messages()
    for message in quoted:
        # what a message fills in is … there and here, or an example of it
        pieces = [re.escape(p) for p in re.split(r"…|loftq|line 3|, not \d", message) if len(p.strip(" .,;()")) > 3]
        assert pieces, message
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"no message reads: {message}"


def slug(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_match_the_code(monkeypatch):
    monkeypatch.setenv("COLUMNS", "37")  # the terminal has no say in them
    assert generator().main(["--check"]) == 0, "run `make docs`"


def test_check_reports_a_stale_page(tmp_path, monkeypatch, capsys):
    generate = generator()
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (tmp_path / "cli.md").write_text("old\n", encoding="utf-8")
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err.strip() == "docs/cli.md do not match the code; run `make docs`"
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == "old\n"


def test_every_verb_and_name_is_documented():
    cli = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for verb, command in commands().items():
        assert f"## loftq {verb}\n" in cli
        section = cli.partition(f"## loftq {verb}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            names = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            assert "--help" in names or all(f"`{name}`" in section for name in names)
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert all(f"## {name}\n" in api for name in loftq.__all__)


@pytest.fixture(scope="module")
def decode():
    """The reference decoder of docs/format.md."""
    text = next(t for _, t in blocks(ROOT / "docs" / "format.md") if "def decode" in t)
    assert set(re.findall(r"^import (\w+)", text, re.MULTILINE)) == {"numpy"}
    namespace: dict = {}
    exec(text, namespace)
    return namespace["decode"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_reference_decoder(decode, bits, codebook):
    """Bit for bit: both compute (codebook + offset) * scale in float32."""
    weight = torch.randn(9, 128, generator=torch.Generator().manual_seed(bits))
    for columns, double_quant, dtype in itertools.product(
        (1, 70, 128), (False, True), ("float16", "float32", "bfloat16")
    ):
        spec = loftq.QuantSpec(bits=bits, codebook=codebook, double_quant=double_quant, scale_dtype=dtype)
        stored = loftq.decompose(weight[:, :columns], spec, rank=1, num_iter=0).quantized
        bits_of = {n: t.view(torch.uint16) if t.dtype == torch.bfloat16 else t for n, t in stored.state_dict().items()}
        tensors = {name: tensor.numpy() for name, tensor in bits_of.items()}
        actual = decode(tensors, bits, spec.block_size, columns)
        np.testing.assert_array_equal(actual, stored.dequantize().numpy(), err_msg=f"{columns} columns, {spec}")


def test_example_finetunes(tmp_path, monkeypatch, capsys):
    """The example, from a quantized folder to an adapter that loads, evaluates and merges."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model()
    loftq.quantize_checkpoint("tiny-model", "q", loftq.LoftQConfig(bits=2, rank=8), progress=False)
    options = ["--steps", "12", "--length", "64", "--learning-rate", "1e-2"]
    finetune()["main"](["q", "--text", "my-text.txt", "--out", "adapter", *options])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.1, result
    loftq.load("q", adapter="adapter")
    loftq.export_dense("q", "merged", adapter="adapter")
    shutil.rmtree("merged")


# Which of our packages and modules each of the lower ones may import.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "kernels": {"kernels", "errors"},
    "codec": {"codec", "config", "errors", "kernels"},
    "solver": {"solver", "codec", "kernels", "config", "errors"},
    "modules": {"modules", "codec", "kernels", "config", "errors"},
}


def our_imports(file: Path) -> set[str]:
    """The first-level names of ours that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = [f"loftq.{a.name}" for a in node.names] if node.module == "loftq" else [node.module or ""]
        found |= {name.split(".")[1] if "." in name else "loftq" for name in names if name.split(".")[0] == "loftq"}
    return found


def test_imports_go_one_way():
    package = ROOT / "src" / "loftq"
    for file in package.rglob("*.py"):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        imported = our_imports(file)
        if part in MAY_IMPORT:
            beyond = imported - MAY_IMPORT[part]
            assert not beyond, f"{file.relative_to(ROOT)} imports {sorted(beyond)}"
        if part != "cli":
            assert "cli" not in imported, f"{file.relative_to(ROOT)} imports the command line"

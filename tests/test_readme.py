"""The README's Python example and table; its command lines are parsed in test_docs.py."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from tiny import tiny_model

ROOT = Path(__file__).parent.parent


def test_python_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    tiny_model("llama").save_pretrained(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    before, after = code.replace("path/or/hub-id", "source").split("# ... train it")
    namespace = {}
    exec(before.replace("rank=64", "rank=4"), namespace)
    namespace["model"].save_pretrained("my-adapter")
    exec("#" + after, namespace)
    assert (tmp_path / "my-model/config.json").exists()


@pytest.mark.parametrize("script", ["readme_table.py", "init/table.py", "finetune/table.py", "finetune/tasks.py"])
def test_tables_are_the_recorded_results(script, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str((ROOT / "benchmarks" / script).parent))
    spec = importlib.util.spec_from_file_location("table_of_results", ROOT / "benchmarks" / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses looks for its names
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, f"run python benchmarks/{script}"


def test_make_commands_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

"""``loftq ablate`` end to end: its tables against norms and perplexities computed apart in float64, resuming, refusals."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

import loftq
from loftq.ablate import Ablation, Factors, Sweep, ablate, run
from loftq.calibrate import kept
from loftq.checkpoint.source import SafetensorsSource
from loftq.errors import ConfigError, LoftQError, OutputError, SourceError
from sweeps import invoke, table

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, WINDOW = 300, 64


def texts(stories_dir):
    file = stories_dir / "tokens.safetensors"
    return f"{file}:train", f"{file}:eval"


def settings(stories_dir, **changes):
    options = {
        "sweep": Sweep(bits=(2, 4), iters=(0, 5), rank=(4,), base={"bits": 2}),
        "text": texts(stories_dir)[1],
        "max_tokens": TOKENS,
        "window": WINDOW,
        "calibration_samples": 8,
        "calibration_length": 64,
    }
    return Ablation(str(stories_dir), **{**options, **changes})


@pytest.fixture(scope="module")
def swept(stories_dir, tmp_path_factory):
    """A sweep by the command line, with a calibrated cell and pictures."""
    out = tmp_path_factory.mktemp("ablate") / "out"
    train, text = texts(stories_dir)
    done = invoke(
        *(stories_dir, "--out", out, "--iters", "0,1,5", "--bits", "2,4", "--base", "bits=2", "--rank", "4,8"),
        *("--calibration", f"none,{train}", "--calibration-samples", 8, "--calibration-length", 64),
        *("--method", "default,loftq-svd-first", "--text", text, "--max-tokens", TOKENS, "--window", WINDOW, "--json"),
    )
    return out, done


def test_rows(swept):
    out, done = swept
    rows = table(out / "ablation.csv")
    cells = [(r["method"], r["bits"], r["rank"], r["iters"]) for r in rows]
    assert sorted(cells) == sorted(
        [
            ("float", "32", "0", "0"),
            ("loftq", "2", "4", "5"),
            ("loftq-svd-first", "2", "4", "5"),
            ("loftq", "4", "4", "5"),
            ("loftq", "2", "8", "5"),
            ("loftq", "2", "4", "1"),
            ("loftq-data", "2", "4", "5"),
            ("qlora", "2", "0", "0"),
            ("qlora", "4", "0", "0"),
        ]
    )
    assert [r["error"] for r in rows] == [""] * len(rows)
    printed = json.loads(done.stdout)
    assert [str(r["rank"]) for r in printed] == [r["rank"] for r in rows]
    assert [r["perplexity"] for r in printed] == [float(r["perplexity"]) for r in rows]
    calibrated = next(r for r in rows if r["method"] == "loftq-data")
    assert calibrated["calibration"].endswith("tokens.safetensors:train")
    assert float(calibrated["damping"]) == 0.005
    assert {r["calibration"] for r in rows if r is not calibrated} == {"none"}
    assert "[9/9]" in done.stderr
    assert "left" in done.stderr
    modules = table(out / "modules.csv")
    assert len(modules) == (len(rows) - 1) * 35
    assert {m["layer"] for m in modules} == set("01234")
    assert {m["kind"] for m in modules if "down" in m["name"]} == {"mlp.down_proj"}


def test_numbers_against_float64(swept, stories_dir, tmp_path):
    """W - Q - B A from the written tensors of an independent quantization, its norms by numpy."""
    out, _ = swept
    config = loftq.LoftQConfig(bits=2, rank=4, method="loftq", calibration=None)
    loftq.quantize_checkpoint(stories_dir, tmp_path / "q", config, progress=False)
    source = SafetensorsSource(stories_dir)
    factors = SafetensorsSource(tmp_path / "q" / "loftq_init", single="adapter_model.safetensors")
    model = loftq.load(tmp_path / "q", dtype=torch.float32)
    packed = {n: m for n, m in model.named_modules() if hasattr(m, "dequantize")}
    expected = {}
    for name in [n.removesuffix(".weight") for n in source.tensors if "proj" in n]:
        weight = source.read(f"{name}.weight").double().numpy()
        backbone = next(m for n, m in packed.items() if f"{name}." in f"{n}.").dequantize().detach().double().numpy()
        lora = {
            side: next(factors.read(n) for n in factors.tensors if f"{name}.lora_{side}" in n).double().numpy()
            for side in "AB"
        }
        error = weight - backbone - lora["B"] @ lora["A"]  # alpha is the rank
        norms = [np.linalg.norm(error), np.linalg.norm(error, 2)]
        expected[name] = [norms[0], norms[0] / np.linalg.norm(weight), norms[1], norms[1] / np.linalg.norm(weight, 2)]
    columns = ("frobenius", "frobenius_relative", "spectral", "spectral_relative")
    chosen = {"method": "loftq", "bits": "2", "rank": "4", "iters": "5"}
    for m in table(out / "modules.csv"):
        if chosen.items() <= m.items():
            # products in float32: eps of the weights, which are 6 times the errors
            assert [float(m[c]) for c in columns] == pytest.approx(expected.pop(m["name"]), rel=1e-5)
    assert not expected
    (row,) = [r for r in table(out / "ablation.csv") if chosen.items() <= r.items()]
    details = [m for m in table(out / "modules.csv") if chosen.items() <= m.items()]
    for column in columns:
        assert float(row[column]) == pytest.approx(np.mean([float(m[column]) for m in details]), rel=1e-12)
    ids = SafetensorsSource(stories_dir, single="tokens.safetensors").read("eval")[:TOKENS].long()
    assert float(row["perplexity"]) == pytest.approx(windowed_perplexity(model, ids), rel=1e-4)
    full = tf.AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
    (first,) = [r for r in table(out / "ablation.csv") if r["method"] == "float"]
    assert float(first["perplexity"]) == pytest.approx(windowed_perplexity(full, ids), rel=1e-4)


@torch.no_grad()
def windowed_perplexity(model, ids):
    losses = []
    for start in range(0, ids.numel() - 1, WINDOW):
        piece = ids[start : start + WINDOW + 1]
        logits = model(input_ids=piece[None, :-1]).logits[0].double()
        losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def test_pictures(swept):
    out, _ = swept
    names = ("discrepancy", "discrepancy_layers", "metric_vs_iters", "metric_vs_bits", "metric_vs_rank")
    assert sorted(p.name for p in out.glob("*.png")) == sorted(f"{n}.png" for n in names)
    assert all((out / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in names)
    assert not list(out.glob(".*.partial*"))


def test_colours_are_the_methods_and_no_two_lines_look_alike():
    from loftq.ablate.plots import _styles
    from loftq.ablate.series import Series
    from loftq.report import palette

    def line(method, bits, iters, calibration=None):
        return Series(Factors(method, bits, 8, iters, "lloyd", None, calibration), {})

    lines = [line(m, bits, 5) for m in ("loftq", "loftq-svd-first") for bits in (2, 3)]
    lines += [line("qlora", 2, 0), line("loftq-data", 2, 5, "a"), line("loftq-data", 2, 5, "b")]
    styles = _styles(lines, "rank")
    assert [s.colour for s in styles] == [palette.style(one.factors.method).colour for one in lines]
    assert styles[0][1:] == styles[2][1:], "the same bits and T, the same line"
    assert len(set(styles)) == len(styles)


def test_the_same_command_computes_nothing(swept, stories_dir, monkeypatch):
    out, _ = swept
    before = (out / "ablation.csv").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(run, "quantize_checkpoint", never)
    monkeypatch.setattr(run, "load_for_inference", never)
    train, text = texts(stories_dir)
    done = invoke(
        *(stories_dir, "--out", out, "--iters", "5,1", "--bits", "2", "--rank", "4"),
        *("--calibration", f"none,{train}", "--calibration-samples", 8, "--calibration-length", 64, "--no-plots"),
        *("--method", "loftq,default", "--text", text, "--max-tokens", TOKENS, "--window", WINDOW),
    )
    assert done.stderr.count("known") == 4, done.stderr
    assert "perplexity" in done.stdout
    assert (out / "ablation.csv").read_bytes() == before


def test_resumes_where_it_was_interrupted(stories_dir, tmp_path, monkeypatch):
    chosen = settings(stories_dir, target_modules=("q_proj", "down_proj"))
    whole = [row for row, _ in ablate(chosen, tmp_path / "whole", progress=False)]
    assert len(whole) == 5
    quantize = run.quantize_checkpoint
    done = []

    def interrupted(*args, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return quantize(*args, **kwargs)

    monkeypatch.setattr(run, "quantize_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(ablate(chosen, tmp_path / "out", progress=False))
    assert len(table(tmp_path / "out" / "ablation.csv")) == 3
    assert len(table(tmp_path / "out" / "modules.csv")) == 2 * 10
    monkeypatch.setattr(run, "quantize_checkpoint", quantize)
    again = list(ablate(chosen, tmp_path / "out", progress=False))
    assert [fresh for _, fresh in again] == [False] * 3 + [True] * 2

    def measured(rows):
        return [{k: v for k, v in row.to_dict().items() if k != "seconds"} for row in rows]

    assert measured(row for row, _ in again) == measured(whole)
    assert not (tmp_path / "out" / "cells").exists()


def test_further_values_and_other_settings(stories_dir, tmp_path):
    out = tmp_path / "out"
    list(ablate(settings(stories_dir, text=None, sweep=Sweep(bits=(2,), rank=(4,))), out, progress=False))
    more = settings(stories_dir, text=None, sweep=Sweep(bits=(2, 3.2), rank=(4,), base={"bits": 3.2}))
    again = list(ablate(more, out, progress=False))
    assert [fresh for _, fresh in again] == [True, False]
    assert again[1][0].bits_per_weight < again[0][0].bits_per_weight < 4, "mixed widths"
    with pytest.raises(OutputError, match="another block_size"):
        next(ablate(settings(stories_dir, text=None, block_size=32), out))
    with pytest.raises(OutputError, match="another text "):
        next(ablate(settings(stories_dir), out))
    (out / "ablation.csv").write_text("method,bits\nloftq,two\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"ablation\.csv cannot be read"):
        next(ablate(more, out))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(OutputError, match="something else than a sweep"):
        next(ablate(more, tmp_path / "mine"))


def test_calibrates_once_for_each_text(stories_dir, tmp_path, monkeypatch):
    file = tmp_path / "other.safetensors"
    ids = SafetensorsSource(stories_dir, single="tokens.safetensors").read("train")[:2000].contiguous()
    save_file({"ids": ids}, file)
    calls = []
    collect = kept.collect_statistics
    monkeypatch.setattr(kept, "collect_statistics", lambda *a, **k: calls.append(a[1].calibration) or collect(*a, **k))
    train, _ = texts(stories_dir)
    other = f"{file}:ids"
    sweep = Sweep(calibration=(train, other), damping=(0.001, 0.1), rank=(4,), bits=(2,))
    chosen = settings(stories_dir, sweep=sweep, text=None, target_modules=("q_proj",))
    rows = [r for r, _ in ablate(chosen, tmp_path / "out", progress=False)]
    assert calls == [train, other]
    assert len({row.frobenius for row in rows}) == 3
    save_file({"ids": ids.flip(0)}, file)
    with pytest.raises(OutputError, match="another calibration_sha256"):
        next(ablate(chosen, tmp_path / "out"))


def test_a_failing_cell_is_a_row_and_tried_again(stories_dir, tmp_path, monkeypatch):
    quantize = run.quantize_checkpoint

    def fails(source, folder, config, **kwargs):
        if config.num_iter == 0:
            raise LoftQError("it went wrong, twice")
        return quantize(source, folder, config, **kwargs)

    monkeypatch.setattr(run, "quantize_checkpoint", fails)
    chosen = settings(stories_dir, text=None, target_modules=("q_proj",))
    rows = [row for row, _ in ablate(chosen, tmp_path / "out", progress=False)]
    assert [row.error for row in rows if row.factors.iters == 0] == ["it went wrong, twice"] * 2
    monkeypatch.undo()
    again = list(ablate(chosen, tmp_path / "out", progress=False))
    assert [fresh for _, fresh in again] == [row.factors.iters == 0 for row in rows]
    assert all(row.error is None for row, _ in again)


def test_encoder_has_norms_only(minilm_dir, tmp_path):
    sweep = Sweep(bits=(2,), rank=(8,), iters=(0, 1))
    chosen = Ablation(str(minilm_dir), sweep, target_modules=r"encoder\.layer\.2\..*")
    rows = [row for row, _ in ablate(chosen, tmp_path / "out", progress=False)]
    assert [row.perplexity for row in rows] == [None, None]
    assert rows[0].factors == Factors("loftq", 2, 8, 1)
    assert rows[0].frobenius_relative < rows[1].frobenius_relative
    assert rows[0].spectral_relative < rows[1].spectral_relative
    with pytest.raises(ConfigError, match="predicts no next token; leave the text out"):
        next(ablate(Ablation(str(minilm_dir), sweep, text="pydoc"), tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iters", "0,x"], "--iters has 'x', expected whole numbers with commas such as 0,1,5"),
        (["--damping", "a"], "--damping has 'a', expected numbers"),
        (["--base", "bits"], "--base has 'bits', expected FACTOR=VALUE"),
        (["--bits", ""], "--bits is .., which names nothing"),
        (["--task", "causal"], "needs --task and --data, but --data is missing"),
        (["--data", "x.jsonl"], "but --task is missing"),
        (["--task", "causal", "--data", "x.jsonl"], "nothing to measure them on"),
        (["--max-steps", "5"], "--max-steps is for fine-tuning"),
        (["--eval-limit", "5"], "--eval-limit is for fine-tuning"),
        (["--task", "causal", "--data", "no.jsonl", "--eval-data", "no.jsonl"], "no.jsonl"),
        (["--calibration", "none,no.jsonl"], "no.jsonl"),
        (["--text", "no.txt"], "no.txt"),
        (["--text", "pydoc", "--window", "129"], "window is 129, but the model has 128 positions"),
        (["--bits", "2,2.1"], "2.1 bits are out of reach"),
        (["--scale", "max"], "scale is 'max'"),
        (["--calibration", "a.txt", "--text", "a.txt"], "expected two texts"),
        (["--target-modules", "qproj"], "selects no linear layer"),
    ],
)
def test_mistakes_leave_nothing(llama, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoftQError, match=message) as caught:
        invoke(llama.parent / "source", "--out", "out", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()

"""``loftq compare`` on a real small model: every number against the function that computes it alone, and resuming."""

import json
from types import SimpleNamespace

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import loftq
import loftq.compare as work
from loftq import LoftQConfig, quantize_checkpoint
from loftq.calibrate import kept
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import open_source
from loftq.compare import Comparison, average_bits, compare, first_layers
from loftq.errors import ConfigError, LoftQError, OutputError, SourceError
from loftq.evaluate.divergence import Reference, score
from loftq.evaluate.models import load_for_inference
from loftq.evaluate.output_error import output_errors
from loftq.evaluate.text import builtin_text
from loftq.evaluate.tokens import text_tokens
from loftq.modules import PackedWeight
from loftq.plan.targets import plan_modules
from tiny import first_output, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {
    *("method", "bits", "bpw", "rank", "weight_error", "output_error", "perplexity", "perplexity_se"),
    *("kl", "kl_se", "seconds", "bytes"),
}
EXTRA = {"command", "adapter_bytes", "seed", "error"}


def settings(stories_dir, **changes):
    options = {
        "model": str(stories_dir),
        "methods": ("qlora", "loftq"),
        "bits": (2, 4),
        "rank": 4,
        "text": f"{stories_dir / 'tokens.safetensors'}:eval",
        "max_tokens": 600,
        "window": 128,
    }
    return Comparison(**{**options, **changes})


@pytest.fixture(scope="module")
def statistics(stories_dir):
    modules = plan_modules(meta_model(open_source(stories_dir).config()), LoftQConfig())
    generator = torch.Generator().manual_seed(0)
    widths = {name: plan.shape[1] for name, plan in modules.items()}
    return {n: SimpleNamespace(second_moment=torch.rand(w, generator=generator) + 0.01) for n, w in widths.items()}


@pytest.fixture(scope="module")
def finished(stories_dir, statistics, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    cells = list(compare(settings(stories_dir), out, statistics=statistics, command="loftq compare ..."))
    return out, cells


def test_rows(finished):
    out, cells = finished
    rows = json.loads((out / "compare.json").read_text())
    assert [(r["method"], r["bits"]) for r in rows] == [
        ("float", 32),
        ("qlora", 2),
        ("loftq", 2),
        ("qlora", 4),
        ("loftq", 4),
    ]
    assert all(set(row) == KEYS | EXTRA for row in rows)
    assert all(fresh for _, fresh in cells)
    assert [cell.to_dict() for cell, _ in cells] == rows
    assert all(row["error"] is None for row in rows)
    full = rows[0]
    assert (full["bpw"], full["weight_error"], full["output_error"], full["kl"]) == (32, 0, 0, 0)
    assert not list(out.glob("*-*")), "quantized folders are removed"


def test_numbers_are_those_of_each_function_alone(finished, stories_dir, statistics, tmp_path):
    row = next(cell for cell, _ in finished[1] if (cell.method, cell.bits) == ("loftq", 2))
    quantizer = {"codebook": "nf", "scale": "absmax"}  # LoftQ's own
    config = LoftQConfig(bits=2, rank=4, method="loftq", calibration=None, **quantizer)
    report = quantize_checkpoint(stories_dir, tmp_path / "q", config, progress=False)
    ids = text_tokens(f"{stories_dir / 'tokens.safetensors'}:eval", str(stories_dir), 600)
    errors = output_errors(tmp_path / "q", stories_dir, statistics)
    found = score(load_for_inference(tmp_path / "q"), Reference.of(load_for_inference(stories_dir), ids, 128))
    assert row.bpw == report.bits_per_weight
    assert (row.bytes, row.adapter_bytes) == (report.weight_bytes, report.adapter_bytes)
    assert (row.weight_error, row.output_error) == (errors.weight_error, errors.output_error)
    assert (row.perplexity, row.perplexity_se, row.kl, row.kl_se) == pytest.approx(
        (found.perplexity, found.perplexity_se, found.kl, found.kl_se), rel=1e-4
    )  # the packed model itself: merging rounds each weight once more
    layers = json.loads((finished[0] / "layers" / "loftq-2.json").read_text())
    assert layers == [m.to_dict() for m in errors.modules]


def test_calibrates_once_for_all(stories_dir, tmp_path, monkeypatch):
    """The statistics are those of a direct forward pass, serve the methods, and are collected a single time."""
    calls = []
    collect = kept.collect_statistics
    monkeypatch.setattr(kept, "collect_statistics", lambda *a, **k: calls.append(collect(*a, **k)) or calls[-1])
    chosen = settings(
        stories_dir,
        methods=("qlora", "qera", "cloq"),
        bits=(2,),
        calibration=f"{stories_dir / 'tokens.safetensors'}:train",
        calibration_samples=4,
        calibration_length=64,
        max_tokens=200,
    )
    rows = {cell.method: cell for cell, _ in compare(chosen, tmp_path / "out")}
    assert len(calls) == 1
    assert [row.error for row in rows.values()] == [None] * 4
    assert rows["qera"].output_error < rows["qlora"].output_error
    assert rows["cloq"].output_error < rows["qlora"].output_error
    model = load_for_inference(stories_dir)
    seen = []
    name = "model.layers.2.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    from loftq.calibrate.text import calibration_tokens

    with torch.no_grad():
        model(input_ids=calibration_tokens(chosen.calibration, None, samples=4, length=64).ids)
    x = torch.cat(seen).double()
    torch.testing.assert_close(calls[0][name].second_moment.double(), x.T @ x / x.shape[0], rtol=1e-4, atol=1e-5)


def test_better_methods_are_better(finished):
    by_name = {(cell.method, cell.bits): cell for cell, _ in finished[1]}
    for key in ("weight_error", "kl", "perplexity"):
        values = [getattr(by_name[name], key) for name in (("qlora", 2), ("loftq", 2), ("loftq", 4))]
        assert values == sorted(values, reverse=True), key


def test_the_same_command_computes_nothing(finished, stories_dir, monkeypatch):
    out, cells = finished
    before = (out / "compare.json").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(work, "quantize_checkpoint", never)
    monkeypatch.setattr(work, "load_for_inference", never)
    again = list(compare(settings(stories_dir), out))
    assert [cell for cell, _ in again] == [cell for cell, _ in cells]
    assert not any(fresh for _, fresh in again)
    assert (out / "compare.json").read_bytes() == before


def test_resumes_and_extends(stories_dir, tmp_path):
    out = tmp_path / "out"
    running = compare(settings(stories_dir, methods=("qlora",)), out)
    next(running)
    next(running)
    running.close()  # interrupted after the first of two
    assert len(json.loads((out / "compare.json").read_text())) == 2
    more = list(compare(settings(stories_dir, methods=("qlora", "loftq"), bits=(2,)), out))
    assert [(cell.method, fresh) for cell, fresh in more] == [("float", False), ("qlora", False), ("loftq", True)]


def test_a_failing_cell_is_a_row_and_tried_again(stories_dir, tmp_path, monkeypatch):
    def fails(source, folder, config, **kwargs):
        if config.method == "qlora":
            raise LoftQError("it went wrong")
        return quantize_checkpoint(source, folder, config, **kwargs)

    chosen = settings(stories_dir, bits=(3,), max_tokens=100)
    monkeypatch.setattr(work, "quantize_checkpoint", fails)
    rows = {cell.method: cell for cell, _ in compare(chosen, tmp_path / "out")}
    assert rows["qlora"].error == "it went wrong"
    assert rows["qlora"].perplexity is None
    assert rows["loftq"].error is None
    monkeypatch.undo()
    again = {cell.method: (cell, fresh) for cell, fresh in compare(chosen, tmp_path / "out")}
    assert again["qlora"][0].error is None
    assert {name: fresh for name, (_, fresh) in again.items()} == {"float": False, "qlora": True, "loftq": False}


def test_other_settings_and_other_folders(finished, stories_dir, tmp_path):
    with pytest.raises(OutputError, match="another rank"):
        next(compare(settings(stories_dir, rank=5), finished[0]))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        next(compare(settings(stories_dir), tmp_path))


def test_other_tokens_under_the_same_name(stories_dir, tmp_path):
    text = tmp_path / "ids.safetensors"
    chosen = settings(stories_dir, text=f"{text}:eval", methods=("qlora",), bits=(4,), max_tokens=50)
    save_file({"eval": torch.arange(50)}, text)
    next(compare(chosen, tmp_path / "out"))
    save_file({"eval": torch.arange(50).flip(0)}, text)
    with pytest.raises(OutputError, match="another text_sha256"):
        next(compare(chosen, tmp_path / "out"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_computes_the_same(name, monkeypatch):
    model = tiny_model(name)
    quantized = loftq.quantize_model(
        model, LoftQConfig(bits=3, rank=4, method="loftq", calibration=None), progress=False
    )
    packed = first_output(quantized.eval(), name)
    monkeypatch.setattr(work.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert work.merged(quantized) is quantized
    monkeypatch.undo()
    dense = work.merged(quantized)
    assert not any(isinstance(module, PackedWeight) for module in dense.modules())
    torch.testing.assert_close(first_output(dense, name), packed, rtol=1e-4, atol=1e-5)


def test_keep(stories_dir, tmp_path):
    list(compare(settings(stories_dir, methods=("qlora",), bits=(2,), max_tokens=50, keep=True), tmp_path / "out"))
    assert (tmp_path / "out" / "qlora-2" / "loftq_report.json").exists()


def test_encoder_has_errors_only(minilm_dir, tmp_path):
    chosen = Comparison(str(minilm_dir), ("qlora",), (2,), rank=2)
    rows = [cell for cell, _ in compare(chosen, tmp_path / "out")]
    assert [(cell.perplexity, cell.kl) for cell in rows] == [(None, None)] * 2
    assert 0.2 < rows[1].weight_error < 0.7
    assert rows[1].error is None


@pytest.mark.parametrize(("target", "low", "high"), [(2.5, 2, 4), (3.2, 3, 4), (3.6, 3, 4), (6.0, 4, 8)])
def test_fractional_bits(stories_dir, target, low, high):
    """The most layers that stay at or below the target, counted one layer at a time."""
    model = meta_model(open_source(stories_dir).config())
    config = first_layers(model, target, {"rank": 4})

    def average(count):
        return average_bits(plan_modules(model, LoftQConfig(bits=low, first_layers_bits=(count, high))))

    assert config.bits == low
    count, _ = config.first_layers_bits
    assert average(count) <= target
    assert count == 5 or average(count + 1) > target
    assert average_bits(plan_modules(model, config)) == average(count)


@pytest.mark.parametrize(("target", "low"), [(2.1, 2), (4.5, 4)])
def test_fractional_bits_out_of_reach(stories_dir, target, low):
    """Of five layers one alone is too much; the width below is another number than the one asked for."""
    model = meta_model(open_source(stories_dir).config())
    with pytest.raises(ConfigError, match=rf"{target:g} bits are out of reach: .* choose {low} bits, or an average of"):
        first_layers(model, target, {"rank": 4})


def test_fractional_bits_mix_widths(stories_dir, tmp_path):
    rows = [
        c
        for c, _ in compare(settings(stories_dir, methods=("qlora",), bits=(2, 3.2, 4), max_tokens=50), tmp_path / "o")
    ]
    assert rows[1].bpw < rows[2].bpw < rows[3].bpw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("nonsense",)}, "method is 'nonsense'"),
        ({"methods": ("cloq",)}, "give --calibration"),
        ({"methods": ()}, "methods is empty"),
        ({"bits": (2, 2)}, "expected different values"),
        ({"bits": (9,)}, "a number from 2 to 8"),
        ({"rank": 0}, "rank is 0"),
        ({"calibration": "a.txt", "text": "./a.txt"}, "expected two texts"),
        ({"calibration": "t.safetensors:a", "text": "t.safetensors:a"}, "expected two texts"),
    ],
)
def test_bad_settings(stories_dir, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(stories_dir, **changes)


def test_texts_that_are_apart(stories_dir):
    settings(stories_dir, calibration="pydoc", text="pydoc")
    settings(stories_dir, calibration="t.safetensors:train", text="t.safetensors:eval")


def test_tokens(stories_dir, tmp_path, monkeypatch):
    file = stories_dir / "tokens.safetensors"
    assert text_tokens(f"{file}:eval", "", 10).shape == (10,)
    assert text_tokens(f"{file}:eval", "").dtype == torch.int64
    with pytest.raises(SourceError, match="no tensor 'none', expected one of"):
        text_tokens(f"{file}:none", "")
    with pytest.raises(SourceError, match="does not exist"):
        text_tokens(f"{tmp_path}/none.safetensors:eval", "")
    seen = []
    monkeypatch.setattr("loftq.evaluate.tokens.load_tokenizer", lambda model: None)
    monkeypatch.setattr("loftq.evaluate.tokens.encode", lambda tokenizer, text, limit: seen.append(text))
    text_tokens("pydoc", "model")
    whole = builtin_text()
    assert seen == [whole[int(0.6 * len(whole)) :]]


def test_command_line(stories_dir, tmp_path):
    from loftq.cli.compare import compare as verb

    app = typer.Typer()
    app.command()(verb)
    out, pictures = tmp_path / "out", tmp_path / "plots"
    text = f"{stories_dir / 'tokens.safetensors'}:eval"
    arguments = [str(stories_dir), "--out", str(out), "--methods", "qlora,loftq", "--bits", "2,3.2", "--rank", "2"]
    arguments += ["--text", text, "--max-tokens", "100", "--window", "64"]
    done = CliRunner().invoke(app, [*arguments, "--json", "--plots", str(pictures)], catch_exceptions=False)
    rows = json.loads(done.stdout)
    assert len(rows) == 5
    assert rows == json.loads((out / "compare.json").read_text())
    assert "[2/5] qlora, 2 bits: perplexity" in done.stderr
    assert "left" in done.stderr
    names = sorted(path.name for path in pictures.iterdir())
    assert names == [
        "kl.png",
        "perplexity.png",
        "quantizer.png",
        "weight_error.png",
    ]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "weight error" in shown.stdout
    assert shown.stderr.count("known") == 5


def test_a_perplexity_far_above_the_others_is_cut_off_and_said():
    from matplotlib.figure import Figure

    from loftq.report.plots import cut_above, cut_values, plain_ticks

    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.plot([2, 3], [4.4e9, 90.0])
    axes.plot([2, 3], [50.0, 25.0])
    cut_above(axes, 300.0)
    plain_ticks(axes)
    assert axes.get_ylim() == pytest.approx((25 / 1.08, 300))
    shown = [tick for tick in axes.get_yticks() if 25 <= tick <= 300]
    assert len(shown) >= 3, shown
    assert cut_values([4.4e9, 27123, 5481.6, 90.0], 300.0) == "4.4e9, 27,000, 5,482"
    assert cut_values([50.0, 25.0], 300.0) == ""


@pytest.mark.parametrize("limits", [(5.5, 7.8), (15, 42), (20, 270), (6.5, 6500)])
def test_a_logarithmic_axis_has_several_numbers(limits):
    from matplotlib.figure import Figure

    from loftq.report.plots import plain_ticks

    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(limits)
    plain_ticks(axes)
    shown = [tick for tick in axes.get_yticks() if limits[0] <= tick <= limits[1]]
    assert 3 <= len(shown) <= 10, shown


def test_every_method_has_a_style_of_its_own():
    from loftq.config import METHODS
    from loftq.report import palette

    assert set(METHODS) <= set(palette.METHODS)
    drawn = [style for name, style in palette.METHODS.items() if name not in ("float", "lora")]
    assert len(set(drawn)) == len(drawn)

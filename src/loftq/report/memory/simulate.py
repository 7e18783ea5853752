"""A training step without data: every operation runs on shapes alone, and the bytes that are alive are counted.

torch's fake tensors have shapes, dtypes and lifetimes but no memory. A forward and a backward pass on them calls the
operations of a real step in the same order, so a model of any architecture and size tells what its step needs in seconds,
whatever the machine. What an operation takes inside itself is not seen, except that of the packed layers.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loftq import kernels
from loftq.errors import ConfigError, first_line
from loftq.kernels import reference
from loftq.modules import PackedModule, QuantExperts, ops
from loftq.modules.ops import plain_scales

# transformers' own product of softmax(Q Kᵀ) V in torch, under a name for which it builds no mask: whether a mask can be
# left out is otherwise decided by values, which fake tensors do not have.
_ATTENTION = "loftq-unmasked-sdpa"


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step beyond the model's own parameters and buffers.

    Attributes:
        stored: alive after the forward pass: what the backward pass will read.
        peak: the most that was alive at any time of the two passes, gradients included.
        gradients: alive after the backward pass.
    """

    stored: int
    peak: int
    gradients: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, while they are alive.

    Args:
        exclude: tensors that are not counted: parameters, buffers, inputs.
        beside: operation -> function of its arguments; the tensors it returns count while the operation runs.

    Attributes:
        live: bytes alive now. peak: the most so far.
    """

    def __init__(self, exclude: Iterable[Tensor], beside: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._beside = beside or {}
        self._excluded = [tensor.untyped_storage() for tensor in exclude]
        self._known = {storage._cdata for storage in self._excluded}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = None
        if func in self._beside:
            with self:
                held = self._beside[func](*args)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        del held
        return result

    def _count(self, storage: Any) -> None:
        if storage._cdata in self._known:  # a view, or one of the excluded
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def simulate_step(
    model: nn.Module,
    *,
    batch_size: int,
    length: int,
    checkpointing: bool = False,
    device: str = "cpu",
    mask: bool = False,
    autocast: torch.dtype | None = None,
) -> StepBytes:
    """Bytes of one forward and backward pass of a transformers or PEFT model on the meta device.

    The loss is the model's own where it has a language-model head, otherwise the sum of its first output. No token is
    padding. Encoder-decoders get ``length`` tokens on both sides.

    Args:
        model: on the meta device; changed: in training mode afterwards.
        checkpointing: keep only the inputs of the layers and compute the rest again (gradient checkpointing).
        device: whose way to multiply with packed weights and to drop out counts, ``cpu`` or ``cuda``.
        mask: fused attention with a mask, as where sequences are padded; without one, a causal model has none at all.
        autocast: the dtype that the forward pass computes in, by the rules of the CPU; ``None`` for that of the weights.

    Raises:
        ConfigError: if the model cannot run on token ids alone, or not with checkpointing.
    """
    from peft.helpers import disable_input_dtype_casting
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.fake_tensor import log as fake_log

    model.train()
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not mask:
        _without_mask(base)
    was_disabled, fake_log.disabled = fake_log.disabled, True  # it prints the traceback of an operation that fails
    try:
        with (
            warnings.catch_warnings(),
            FakeTensorMode(allow_non_fake_inputs=True),
            _dropout_of(device),
            _even_routing(),
        ):
            warnings.simplefilter("ignore")
            if checkpointing:
                base.config.use_cache = False
                # the newer name first: transformers announces that the older one goes
                names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
                getattr(model, next(name for name in names if hasattr(model, name)))()
            model.to_empty(device="cpu")
            base.tie_weights()  # to_empty gives tied modules a parameter each
            ids = torch.zeros(batch_size, length, dtype=torch.long)
            inputs = {"input_ids": ids}
            if base.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = ids
            head = base.get_output_embeddings() is not None
            if head:
                inputs["labels"] = ids
            known = [*model.parameters(), *model.buffers(), ids]
            casts = disable_input_dtype_casting(model, active=autocast is not None)  # as loftq.finetune.trainer does
            with casts, LiveBytes(known, packed_products_on(device)) as count:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    output = model(**inputs)
                loss = output.loss if head else output[0].float().sum()
                del output
                stored = count.live
                loss.backward()
                del loss
            return StepBytes(stored, count.peak, count.live)
    except Exception as error:
        raise ConfigError(
            f"a training step of {type(base).__name__} cannot be run on token ids without data ({first_line(error)}); "
            f"expected a language model or an encoder of the installed transformers"
        ) from None
    finally:
        fake_log.disabled = was_disabled


@contextmanager
def _dropout_of(device: str) -> Iterator[None]:
    """On a GPU dropout keeps a mask of a byte an element for its gradient; on the CPU a mask in the dtype of its input."""
    original = nn.functional.dropout

    def fused(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p > 0 else input

    nn.functional.dropout = fused if device == "cuda" else original
    try:
        yield
    finally:
        nn.functional.dropout = original


@contextmanager
def _even_routing() -> Iterator[None]:
    """Packed experts get equally many tokens each, since no values say which."""
    original = QuantExperts.routed

    def evenly(self: QuantExperts, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        tokens, places = top_k_index.shape
        for expert in range(self.num_experts):
            count = (expert + 1) * tokens * places // self.num_experts - expert * tokens * places // self.num_experts
            if count:
                yield expert, top_k_index.new_zeros(count), top_k_index.new_zeros(count)

    QuantExperts.routed = evenly  # type: ignore[method-assign]
    try:
        yield
    finally:
        QuantExperts.routed = original  # type: ignore[method-assign]


def _without_mask(model: nn.Module) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = _ATTENTION  # type: ignore[union-attr]


def packed_products_on(device: str) -> dict[Any, Callable[..., Any]]:
    """operation -> what a product with a packed weight takes for its duration: the dense copy, and scales in float32.

    On the CPU the factor and the product in another order instead, and a copy, if any, is in the workspace, see
    :func:`workspace_bytes`; only 8-bit scales are turned into others.
    """

    def product(x: Tensor, packed: Tensor, *stored: Any) -> Any:
        return dense(x, packed, *stored, x.shape[-1], packed.shape[0])

    def grad_input(grad: Tensor, packed: Tensor, *stored: Any) -> Any:
        return dense(grad, packed, *stored, stored[-1])

    def dense(x: Tensor, packed: Tensor, *stored: Any) -> Any:
        scale, codebook, zero, absmax, offset, bits, block_size, columns, features = stored
        found = plain_scales(scale, absmax, offset)
        if device == "cpu":
            tokens = x.numel() // x.shape[-1]
            regrouped = tokens <= kernels.few_tokens("cpu", x.dtype)
            at_once = min(tokens, kernels.TOKENS_AT_ONCE) if regrouped else 0
            held = x.new_empty(at_once, x.shape[-1]), x.new_empty(at_once, features, dtype=torch.float32)
            return held if absmax is None else (*held, found)
        floats = found.float(), codebook.float(), None if zero is None else zero.float()
        return floats, reference.dequantize(packed, *floats, bits, block_size, columns).to(x.dtype)

    return {
        torch.ops.loftq.packed_linear.default: product,
        torch.ops.loftq.packed_linear_grad_input.default: grad_input,
    }


def workspace_bytes(model: nn.Module, device: str, dtype: torch.dtype, tokens: int) -> int:
    """The memory that packed layers share on the CPU: the largest tile in ``dtype``, that of the products, if there are so
    many tokens that a tile is written; see :mod:`loftq.modules.ops`."""
    if device != "cpu" or tokens <= kernels.few_tokens("cpu", dtype):
        return 0
    shapes = [
        (shape, spec.block_size)
        for module in model.modules()
        if isinstance(module, PackedModule) and not isinstance(module, nn.Embedding)
        for shape, spec in module.packed_matrices
    ]
    return max((ops.workspace_bytes(*each, dtype) for each in shapes), default=0)

"""An embedding whose table stays packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loftq.codec import QuantizedTensor, quantize
from loftq.config import QuantSpec
from loftq.errors import WeightError
from loftq.modules.ops import packed_rows
from loftq.modules.packed import PackedWeight


class QuantEmbedding(PackedWeight, nn.Embedding):
    """Rows of a packed (num_embeddings, embedding_dim) table, dequantized as they are looked up.

    A subclass of :class:`torch.nn.Embedding`, so PEFT wraps it like any other. ``output_dtype`` is the dtype of the
    dense table it replaced; ``.to(dtype)`` changes it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        spec: QuantSpec,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's, which would allocate a dense table
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self._register_packed(spec, (num_embeddings, embedding_dim), device)
        # an empty tensor that follows .to(dtype) as a parameter of the layer would
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def output_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._like.dtype  # type: ignore[assignment]
        return dtype

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, spec: QuantSpec) -> QuantEmbedding:
        """Quantize a ``torch.nn.Embedding``.

        Raises:
            WeightError: for another kind of layer, or a table with NaN or infinite elements.
        """
        if isinstance(embedding, PackedWeight) or not isinstance(embedding, nn.Embedding):
            raise WeightError(f"got a {type(embedding).__name__}, expected a dense torch.nn.Embedding to quantize")
        layer = cls.from_quantized(
            quantize(embedding.weight, spec), padding_idx=embedding.padding_idx, dtype=embedding.weight.dtype
        )
        return layer.train(embedding.training)

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedTensor, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> QuantEmbedding:
        """A layer around an existing quantized table; nothing is copied."""
        layer = cls(*quantized.shape, padding_idx, spec=quantized.spec, device="meta")
        layer._set_quantized(quantized)
        layer._like = torch.empty(0, dtype=dtype, device=quantized.tensors["weight"].device)
        return layer

    def reset_parameters(self) -> None:
        """Nothing to reset: the table is loaded, not initialised."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = packed_rows(ids.reshape(-1), *self._operands(), self.embedding_dim)
        return rows.view(*ids.shape, self.embedding_dim).to(self._like.dtype)

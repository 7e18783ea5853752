"""Layers whose weights stay packed."""

from loftq.modules.embedding import QuantEmbedding
from loftq.modules.linear import QuantLinear
from loftq.modules.packed import PackedWeight

__all__ = ["PackedWeight", "QuantEmbedding", "QuantLinear"]

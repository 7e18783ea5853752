"""Layers whose weights stay packed."""

from loftq.modules.embedding import QuantEmbedding
from loftq.modules.experts import QuantExperts
from loftq.modules.linear import QuantLinear
from loftq.modules.packed import PackedModule, PackedWeight

__all__ = ["PackedModule", "PackedWeight", "QuantEmbedding", "QuantExperts", "QuantLinear"]

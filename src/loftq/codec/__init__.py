"""Numbers <-> codes. Pure: tensors in, tensors out."""

from loftq.codec.blockwise import quantize
from loftq.codec.codebook import codebook
from loftq.codec.qtensor import QuantizedTensor, storage_layout

__all__ = ["QuantizedTensor", "codebook", "quantize", "storage_layout"]

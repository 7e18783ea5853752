"""Every kernel by Triton, for GPUs; see :mod:`loftq.kernels` for what each computes."""

from loftq.kernels.triton_feedback import descend, descend_coupled, feedback
from loftq.kernels.triton_product import few_tokens, grad_product, product
from loftq.kernels.triton_search import encode, level_moments, search_affine, search_scale
from loftq.kernels.triton_unpack import dequantize, pack, unpack

__all__ = [
    "dequantize",
    "descend",
    "descend_coupled",
    "encode",
    "feedback",
    "few_tokens",
    "grad_product",
    "level_moments",
    "pack",
    "product",
    "search_affine",
    "search_scale",
    "unpack",
]

"""A table of errors as they look, without a model."""

from __future__ import annotations

import itertools

import numpy as np

from loftq.plan.errors import ErrorTable, ModuleErrors, grid

QUANTIZER = {"codebook": "lloyd", "scale": "search", "scale_dtype": "float16", "double_quant": False}
DISTORTION = {2: 0.117, 3: 0.035, 4: 0.0095, 8: 4e-5}  # of Gaussian weights, relative and squared
SHAPES = [(64, 64), (96, 64), (64, 128)]


def synthetic(layers=4, shapes=SHAPES, choices=None, seed=0, noise=0.0) -> ErrorTable:
    """Errors as they look: falling with bits and rank, rising with the block size, different from module to module."""
    rng = np.random.default_rng(seed)
    modules = {}
    for layer, (k, shape) in itertools.product(range(layers), enumerate(shapes)):
        level = rng.uniform(0.5, 2)
        objectives = {
            c: float(
                np.sqrt(
                    DISTORTION[c.bits]
                    * level
                    * (c.block_size / 64) ** 0.07
                    * (1 - min(0.9, 1.5 * c.rank / min(shape)))
                    * (1 + noise * rng.uniform(-1, 1))
                )
            )
            for c in choices or grid((2, 3, 4, 8), (64,), (8,))
        }
        norm, power = rng.uniform(1, 9), rng.uniform(0.1, 3)
        modules[f"layers.{layer}.m{k}"] = ModuleErrors("linear", shape, layer, norm, power, objectives)
    return ErrorTable(modules, {"method": "loftq", "calibration": None, **QUANTIZER})

"""The compression ratios that the LoftQ paper reports (arXiv 2310.08659, Table 7), and what they count.

The paper defines the ratio as (backbone + adapters) / pretrained size and does not say what belongs to each. An
:class:`Accounting` is one reading. Of all readings in :func:`accountings`, :data:`BEST` comes nearest to the table: sizes
of the quantized matrices alone, without embeddings, norms and biases, in 16 bits; N bits a weight; for NormalFloat one
16-bit scale for 64 weights, for the uniform quantizer nothing else, as befits a range for each whole matrix; adapters in 16
bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loftq.checkpoint.source import open_config
from loftq.config import PUBLISHED, LoftQConfig
from loftq.report.memory.footprint import Footprint
from loftq.report.memory.predict import predict_footprint

MODELS = Path(__file__).resolve().parents[2] / "recipes" / "models"
BLOCK = 64


@dataclass(frozen=True)
class Published:
    """A row of the table: ratios in percent. ``quantizer`` is ``uniform`` or ``nf``."""

    model: str
    quantizer: str
    bits: int
    rank: int
    compression: float
    trainable: float

    def settings(self) -> LoftQConfig:
        """The same quantizer here; NormalFloat with the papers' float32 scales."""
        quantizer = PUBLISHED if self.quantizer == "nf" else {"codebook": "uniform"}
        return LoftQConfig(bits=self.bits, rank=self.rank, block_size=BLOCK, calibration=None, **quantizer)


TABLE = (
    Published("deberta-v3-base", "uniform", 2, 16, 15.6, 3.1),
    Published("deberta-v3-base", "uniform", 2, 32, 18.8, 6.3),
    Published("deberta-v3-base", "nf", 2, 16, 17.2, 3.1),
    Published("deberta-v3-base", "nf", 2, 32, 20.4, 6.3),
    Published("bart-large", "nf", 2, 8, 15.3, 1.2),
    Published("bart-large", "nf", 2, 16, 16.7, 2.5),
    Published("bart-large", "nf", 4, 8, 27.8, 1.2),
    Published("bart-large", "nf", 4, 16, 29.0, 2.5),
    Published("bart-large", "uniform", 4, 8, 26.2, 1.2),
    Published("bart-large", "uniform", 4, 16, 27.5, 2.5),
    Published("llama-2-7b", "nf", 2, 64, 16.6, 2.4),
    Published("llama-2-7b", "nf", 4, 64, 29.0, 2.4),
    Published("llama-2-13b", "nf", 2, 64, 16.0, 1.9),
    Published("llama-2-13b", "nf", 4, 64, 28.5, 1.9),
)


@dataclass(frozen=True)
class Accounting:
    """One reading of the definition.

    Attributes:
        scope: ``matrices`` (the quantized modules alone), ``model`` (all parameters, those that are not quantized in 16
            bits), or ``model, embedding`` (the same, and DeBERTa's embedding is quantized and has an adapter).
        scale_bits: of a NormalFloat scale, one for 64 weights; 8.125 is double quantization, 8 bits and a float32 for
            every 256 scales.
        uniform_bits: of the uniform quantizer's range for 64 weights.
        adapter_bits, pretrained_bits: of a parameter of the adapters, and of the pretrained model.
    """

    scope: str
    scale_bits: float
    uniform_bits: float
    adapter_bits: int
    pretrained_bits: int

    def ratios(self, row: Published) -> tuple[float, float]:
        """Compression and trainable ratio of a row by this reading, in percent."""
        embedding = self.scope == "model, embedding" and row.model.startswith("deberta")
        sizes = footprint(row, quantize_embeddings=embedding)
        weights, adapters = sizes.backbone.parameters, sizes.adapters.parameters
        scale = self.scale_bits if row.quantizer == "nf" else self.uniform_bits
        others = 0 if self.scope == "matrices" else sizes.embeddings.parameters + sizes.rest.parameters
        taken = weights * (row.bits + scale / BLOCK) + 16 * others + self.adapter_bits * adapters
        pretrained = weights + others
        return 100 * taken / (self.pretrained_bits * pretrained), 100 * adapters / pretrained

    def largest_difference(self) -> float:
        """From the published compression ratios, in percentage points."""
        return max(abs(self.ratios(row)[0] - row.compression) for row in TABLE)


BEST = Accounting("matrices", 16, 0, 16, 16)


def accountings() -> Iterator[Accounting]:
    """Every reading that is tried."""
    scopes = ("matrices", "model", "model, embedding")
    for values in itertools.product(scopes, (0, 8.125, 16, 32), (0, 32, 64), (16, 32), (16, 32)):
        yield Accounting(*values)


@functools.cache
def footprint(row: Published, *, quantize_embeddings: bool = False) -> Footprint:
    """What `loftq quantize` would write for a row, of a source in 16 bits."""
    settings = row.settings().replace(quantize_embeddings=quantize_embeddings)
    return predict_footprint(open_config(MODELS / row.model), settings)

"""The parts of a quantized model and their bytes, and the ratios that the LoftQ paper defines on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from loftq.codec.qtensor import TensorInfo

PAPER_BYTES = 2  # the paper counts pretrained weights and adapters in 16 bits; see loftq.report.memory.paper


@dataclass(frozen=True)
class Part:
    """Some tensors of a model.

    Attributes:
        parameters: numbers they stand for: of a packed matrix its weights, of others their elements.
        nbytes: what they are stored in, headers of files apart.
    """

    parameters: int
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo]) -> Part:
        """Tensors that stand for themselves."""
        nbytes = sum(info.nbytes for info in tensors.values())
        return cls(sum(info.nbytes // info.dtype.itemsize for info in tensors.values()), nbytes)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a quantized model, tensor by tensor as they lie in its files.

    Attributes:
        backbone: the packed modules: codes, scales, zero points and codebooks; of linear layers, and of the input
            embedding where that is quantized.
        adapters: A and B of every packed module.
        embeddings: all embeddings that are not packed (tokens, positions, types) and the output head, unless it shares
            the embedding's weight.
        rest: norms, biases, task heads and whatever else.
        pretrained_bytes: the same model before quantization, in the dtype of its source.
    """

    backbone: Part
    adapters: Part
    embeddings: Part
    rest: Part
    pretrained_bytes: int

    @property
    def parts(self) -> dict[str, Part]:
        return {name: getattr(self, name) for name in ("backbone", "adapters", "embeddings", "rest")}

    @property
    def total_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def model_parameters(self) -> int:
        """Parameters of the pretrained model; adapters apart."""
        return self.backbone.parameters + self.embeddings.parameters + self.rest.parameters

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the packed modules by their weights."""
        return 8 * self.backbone.nbytes / self.backbone.parameters

    @property
    def compression_ratio(self) -> float:
        """(backbone + adapters) / pretrained size, the paper's definition (arXiv 2310.08659, appendix).

        All three over the quantized modules alone: their packed bytes as stored, their adapters in 16 bits, and their
        pretrained weights in 16 bits. Embeddings that are not quantized, norms and biases are in none of them.
        """
        adapters = PAPER_BYTES * self.adapters.parameters
        return (self.backbone.nbytes + adapters) / (PAPER_BYTES * self.backbone.parameters)

    @property
    def trainable_ratio(self) -> float:
        """Parameters of the adapters by the weights of the quantized modules, the paper's definition."""
        return self.adapters.parameters / self.backbone.parameters

    @property
    def stored_ratio(self) -> float:
        """All bytes, adapters included, by the bytes of the pretrained model in the dtype of its source."""
        return self.total_bytes / self.pretrained_bytes

    @property
    def trainable_share(self) -> float:
        """Parameters of the adapters by all parameters of the model."""
        return self.adapters.parameters / self.model_parameters

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: vars(part) for name, part in self.parts.items()}
        for name in ("total_bytes", "pretrained_bytes", "model_parameters", "bits_per_weight", "compression_ratio"):
            values[name] = getattr(self, name)
        return values | {n: getattr(self, n) for n in ("trainable_ratio", "stored_ratio", "trainable_share")}


def embedding_names(model: nn.Module) -> set[str]:
    """Modules whose tensors count as embeddings: every embedding, and the output head."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (output is not None and module is output)
    }


def split_embeddings(tensors: Mapping[str, TensorInfo], model: nn.Module) -> tuple[Part, Part]:
    """The unpacked tensors of a model as (embeddings, rest), by the module that holds them."""
    names = embedding_names(model)
    embeddings = {n: info for n, info in tensors.items() if n.rpartition(".")[0] in names}
    return Part.of(embeddings), Part.of({n: info for n, info in tensors.items() if n not in embeddings})

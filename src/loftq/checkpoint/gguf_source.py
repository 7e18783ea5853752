"""A .gguf file read one tensor at a time, as the Hugging Face checkpoint it was converted from.

Three sources of knowledge, none of them repeated here: the ``gguf`` package knows the block formats, transformers knows
how the metadata becomes a configuration and how each architecture's tensors were renamed and rearranged, and the model
built on the meta device says which parameters there must be. This module only reads the file's table of contents and
puts the three together for a single tensor, where transformers itself would dequantize the whole file.

transformers 5 has two sets of rules and is moving from the first to the second: tensor processors on numpy arrays
(``modeling_gguf_pytorch_utils``), and weight converters (``integrations.gguf``) for the architectures listed there.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loftq.checkpoint.gguf_file import read_contents
from loftq.codec.qtensor import TensorInfo
from loftq.errors import LoftQWarning, SourceError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CHUNK = 1 << 20  # weights dequantized at a time: 4 MiB of float32 keeps the work space small and in the cache


class GGUFSource:
    """One GGUF file as a checkpoint with Hugging Face names, layouts and configuration.

    ``tensors`` lists what :meth:`read` returns: float32 for blocks and for stored float32, the stored dtype for float16
    and bfloat16. Parameters tied to another one (an output head that is the embedding) are listed once.

    Raises:
        SourceError: no such file, no GGUF, truncated, an architecture or a block format that cannot be read, a model
            whose parameters the file does not all hold, or the ``gguf`` package is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = [self.path]
        if not self.path.is_file():
            raise SourceError(f"{self.path} is not a file, expected a .gguf file; check the path")
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise SourceError(
                f"{self.path} cannot be read because the gguf package is not installed; pip install loftq[gguf]"
            ) from None
        metadata, self._entries = read_contents(self.path)
        self._check_kinds()
        self._architecture = str(metadata["general.architecture"])
        if metadata.get("split.count", 1) not in (0, 1):
            raise SourceError(
                f"{self.path} is one of {metadata['split.count']} parts, expected a single file; join them first with "
                f"`llama-gguf-split --merge`"
            )
        self._config = self._read_config()
        model = self._meta_model()
        self._rules = self._find_rules(model)
        self._parts: dict[str, list[str]] = {}
        self.tensors = self._match(model, metadata)
        # Of most of the weights; the norms beside 16-bit matrices are always stored in float32.
        sizes: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += math.prod(info.shape)
        self._config.dtype = sizes.most_common(1)[0][0]

    def config(self) -> PretrainedConfig:
        """The configuration that the file's metadata describes; a copy, the caller's own."""
        return copy.deepcopy(self._config)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The parameter ``name``, dequantized and in Hugging Face's layout, in memory of its own; with ``index`` that element
        of its first dimension.

        Raises:
            SourceError: if the file ends early, or holds the tensor in another shape than the model's.
        """
        info = self.tensors[name]
        parts = self._parts[name]
        tensor = self._rules.convert(name, parts, self._values)
        if tuple(tensor.shape) != info.shape:
            raise self._unreadable(f"gives {name} the shape {tuple(tensor.shape)}, expected {info.shape}")
        # Rules work in float32, where a permutation of 16-bit values is exact and an offset loses nothing.
        return (tensor if index is None else tensor[index].clone()).to(info.dtype).contiguous()

    def save_extras(self, out_dir: Path) -> None:
        """Write generation settings and, where the file's vocabulary can be rebuilt, the tokenizer to ``out_dir``."""
        from transformers import AutoTokenizer, GenerationConfig

        GenerationConfig.from_model_config(self._config).save_pretrained(out_dir)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tokenizer.save_pretrained(out_dir)
        except Exception as error:
            warnings.warn(
                f"{self.path} holds no tokenizer that transformers can rebuild ({first_line(error)}); put the "
                f"original model's tokenizer files into {out_dir}",
                LoftQWarning,
                stacklevel=2,
            )

    def _unreadable(self, problem: str) -> SourceError:
        return SourceError(f"{self.path} {problem}; convert the original model to safetensors and start from that")

    def _check_kinds(self) -> None:
        """Every block format in use must be one that the gguf package can dequantize: try one block of each."""
        import gguf

        for kind, name in {entry.kind: name for name, entry in self._entries.items()}.items():
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise self._unreadable(f"stores {name} as {kind.name}, which gguf cannot dequantize") from None

    def _read_config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as error:
            raise self._unreadable(
                f"holds a model of architecture {self._architecture!r}, expected one that transformers can read from "
                f"GGUF ({first_line(error)})"
            ) from None
        for attribute in ("quantization_config", "_model_name_or_path"):  # the second is the file's title, no path
            if hasattr(config, attribute):
                delattr(config, attribute)
        return config

    def _meta_model(self) -> PreTrainedModel:
        """The model without its weights; fills ``architectures`` in where the metadata does not name the class."""
        import transformers

        config = self._config
        try:
            with torch.device("meta"):
                if config.architectures:
                    return getattr(transformers, config.architectures[0])(config)
                if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                    model = transformers.AutoModelForCausalLM.from_config(config)
                else:
                    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        except Exception as error:
            raise self._unreadable(
                f"describes a {config.model_type!r} model that transformers cannot build ({first_line(error)})"
            ) from None
        config.architectures = [type(model).__name__]
        return model

    def _find_rules(self, model: PreTrainedModel) -> _ProcessorRules | _ConverterRules:
        from transformers.integrations.gguf import is_gguf_arch_supported

        try:
            if is_gguf_arch_supported(self._architecture):
                return _ConverterRules(self._architecture, self._config)
            return _ProcessorRules(self._architecture, self._config, model)
        except (NotImplementedError, ValueError) as error:
            raise self._unreadable(f"has tensor names that are not known ({first_line(error)})") from None

    def _match(self, model: PreTrainedModel, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        """The model's parameters and where the file holds them; raises where one is missing, warns of leftovers."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = set(model.all_tied_weights_keys)
        leftover = []
        for gguf_name in self._entries:
            name = self._rules.name(gguf_name)
            if name is None or name not in shapes:
                leftover.append(gguf_name)
            elif name not in tied:
                self._parts.setdefault(name, []).append(gguf_name)

        kind = type(model).__name__
        missing = [name for name in shapes if name not in self._parts and name not in tied]
        if missing:
            raise self._unreadable(
                f"lacks {len(missing)} of the {len(shapes)} parameters of {kind} ({missing[0]}), or keeps them where "
                f"transformers does not look (not all mixtures of experts are supported from GGUF yet)"
            )
        for name, parts in self._parts.items():
            stored = [self._entries[part].shape for part in parts]
            if sum(map(math.prod, stored)) != math.prod(shapes[name]):
                raise self._unreadable(
                    f"stores {', '.join(parts)} with shape {', '.join(map(str, stored))}, expected {shapes[name]} for "
                    f"{name} of {kind}"
                )

        scaling = metadata.get(f"{self._architecture}.rope.scaling.type", "none")
        rope = getattr(self._config, "rope_parameters", None) or {}
        if scaling != "none" and rope.get("rope_type", "default") == "default":
            leftover.append(f"rope scaling of type {scaling!r}")
        if leftover:
            more = f" and {len(leftover) - 3} more" if len(leftover) > 3 else ""
            warnings.warn(
                f"{self.path} holds {', '.join(leftover[:3])}{more}, which transformers' {kind} read from GGUF leaves "
                f"out; compare with the original model before relying on the result",
                LoftQWarning,
                stacklevel=3,
            )
        return {
            name: TensorInfo(self._dtype(self._parts[name]), shapes[name]) for name in shapes if name in self._parts
        }

    def _dtype(self, parts: list[str]) -> torch.dtype:
        kept = {"F16": torch.float16, "BF16": torch.bfloat16}
        dtypes = {kept.get(self._entries[part].kind.name, torch.float32) for part in parts}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _values(self, gguf_name: str) -> np.ndarray:
        """A stored tensor as float32 in the file's own layout; plain reads, so that no mapped page stays resident."""
        import gguf

        entry = self._entries[gguf_name]
        columns = entry.shape[-1]
        rows = math.prod(entry.shape[:-1])
        row_bytes = entry.nbytes // max(rows, 1)
        step = max(1, _CHUNK // max(columns, 1))
        out = np.empty((rows, columns), np.float32)
        with open(self.path, "rb") as stream:
            stream.seek(entry.begin)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.fromfile(stream, np.uint8, count * row_bytes)
                if raw.size != count * row_bytes:
                    raise SourceError(f"{self.path} ends inside {gguf_name}; fetch the file again")
                out[start : start + count] = gguf.dequantize(raw.reshape(count, row_bytes), entry.kind)
        return out.reshape(entry.shape)


class _ProcessorRules:
    """Names and layouts by transformers' tensor processors, one class an architecture."""

    def __init__(self, architecture: str, config: PretrainedConfig, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        # The whole configuration rather than what the metadata spells out: a file without head_count_kv would
        # otherwise keep its q and k rows in ggml's order.
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        self._names = get_gguf_hf_weights_map(model, self._processor)

    def name(self, gguf_name: str) -> str | None:
        # Stacked experts are parameters rather than modules, so their names map without the suffix.
        return self._names.get(gguf_name) or self._names.get(gguf_name.removesuffix(".weight"))

    def convert(self, name: str, parts: list[str], values: Any) -> Tensor:
        # Processors that merge several tensors, or rename one, put the result into this dictionary instead.
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for part in parts:
            result = self._processor.process(
                values(part), part, tensor_key_mapping=self._names, parsed_parameters=parsed
            )
            if result.name is not None:
                return torch.from_numpy(np.ascontiguousarray(result.weights))
        return parsed["tensors"][name]


class _ConverterRules:
    """Names and layouts by transformers' weight converters."""

    def __init__(self, architecture: str, config: PretrainedConfig) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        self._config = config
        mapping = get_gguf_conversion_mapping(architecture, config)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]

    def _rename(self, gguf_name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(gguf_name, self._renamings, self._converters)

    def name(self, gguf_name: str) -> str | None:
        return self._rename(gguf_name)[0]

    def convert(self, name: str, parts: list[str], values: Any) -> Tensor:
        patterns = [self._rename(part)[1] for part in parts]
        tensors = [torch.from_numpy(values(part)) for part in parts]
        rule = next((c for c in self._converters if patterns[0] in c.source_patterns), None)
        if rule is None:
            return tensors[0]
        rule = copy.deepcopy(rule)  # it collects its inputs in itself
        for part, pattern, tensor in zip(parts, patterns, tensors, strict=True):
            rule.add_tensor(name, part, pattern, tensor)
        return rule.convert(name, config=self._config)[name]

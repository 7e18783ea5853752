"""One matrix -> Q, lora_A, lora_B. Pure: tensors in, tensors out."""

from loftq.solver.decomposition import Decomposition, decompose, lora_scaling

__all__ = ["Decomposition", "decompose", "lora_scaling"]

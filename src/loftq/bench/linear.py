"""One linear layer with a frozen weight: packed, dense, and bitsandbytes' in its training and its inference form.

``inference`` is a forward pass without gradients; in ``forward + backward`` the input needs a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from loftq.bench import rival
from loftq.bench.bounds import DENSE, INFERENCE, RIVAL, RIVAL_EVAL, TRAINING, linear_case
from loftq.bench.case import Case, Options
from loftq.bench.timing import in_turns
from loftq.codec import quantize
from loftq.config import QuantSpec
from loftq.modules import QuantLinear

SUITE = "linear"
SIZE, QUICK_SIZE = 4096, 256
TOKENS = (1, 64, 512)
WIDTHS = (2, 3, 4)


def title(options: Options) -> str:
    size = QUICK_SIZE if options.quick else SIZE
    return f"a {size} × {size} linear layer with a frozen weight"


def run(options: Options) -> Iterator[Case]:
    size = QUICK_SIZE if options.quick else SIZE
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    packed: dict[str, nn.Module] = {
        f"{bits} bits": QuantLinear.from_quantized(quantize(weight, QuantSpec(bits))) for bits in WIDTHS
    }
    if rival.version() is None:
        options.notice(rival.MISSING)
    for dtype in (torch.float32, torch.bfloat16):
        training = {DENSE: _dense(weight, dtype), **packed}
        inference = dict(training)
        if rival.version() is not None:
            training[RIVAL] = inference[RIVAL] = rival.linear(weight, dtype, training=True)
            layer = rival.linear(weight, dtype, training=False)
            if rival.repacks(layer):
                inference[RIVAL_EVAL] = layer
            else:
                options.notice(rival.NO_EVAL)
        for tokens in TOKENS:
            x = torch.randn(tokens, size, generator=generator).to(dtype)
            grad = torch.randn(tokens, size, generator=generator).to(dtype)
            name = str(dtype).removeprefix("torch.")
            forward = {n: partial(_forward, layer, x) for n, layer in inference.items()}
            yield Case(
                SUITE, linear_case(name, tokens, INFERENCE), in_turns(forward, options.repeats, seconds=options.seconds)
            )
            asked = x.clone().requires_grad_()
            both = {n: partial(_forward_backward, layer, asked, grad) for n, layer in training.items()}
            yield Case(
                SUITE, linear_case(name, tokens, TRAINING), in_turns(both, options.repeats, seconds=options.seconds)
            )


def _dense(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


@torch.no_grad()
def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def _forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(layer(x), x, grad)[0]

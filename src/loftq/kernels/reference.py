"""Every kernel in plain torch, for any device: the definition that the compiled loops are tested against."""

import torch
from torch import Tensor

# A block of a smaller scale keeps the one of its largest number: the reciprocal of a fitted one might overflow.
TINY = 2.0**-100


def packed_row_bytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row: ceil(in_features * bits / 8)."""
    return -(-in_features * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8 codes -> (rows, ceil(n * bits / 8)) uint8, little-endian bit stream a row."""
    rows, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -n % 8)).view(rows, -1, 8).to(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    words = (padded << shifts).sum(-1) if bits < 8 else None
    if words is None:
        return codes.clone()
    byte_shifts = torch.arange(0, 8 * bits, 8, device=codes.device)
    packed = ((words.unsqueeze(-1) >> byte_shifts) & 255).to(torch.uint8).view(rows, -1)
    return packed[:, : packed_row_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of :func:`pack`."""
    if bits == 8:
        return packed[:, :in_features].clone()
    rows = packed.shape[0]
    groups = -(-in_features // 8)
    padded = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[1])).view(rows, groups, bits)
    byte_shifts = torch.arange(0, 8 * bits, 8, device=packed.device)
    words = (padded.to(torch.int64) << byte_shifts).sum(-1)
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(rows, groups * 8)[:, :in_features].contiguous()


def _spread(per_block: Tensor, block_size: int, in_features: int) -> Tensor:
    """(rows, blocks) -> (rows, in_features), each block's number repeated over its elements."""
    return per_block.repeat_interleave(block_size, dim=1)[:, :in_features]


def _blocks(weight: Tensor, block_size: int) -> Tensor:
    """(rows, in) -> (rows, blocks, block_size), the last block filled with NaN where the row does not divide."""
    rows, n = weight.shape
    return torch.nn.functional.pad(weight, (0, -n % block_size), value=float("nan")).view(rows, -1, block_size)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """value = scale * (codebook[code] + zero * codebook[1]), computed in float32 or more, (rows, in_features)."""
    scale, codebook = _at_least_float32(scale), _at_least_float32(codebook)
    value = levels_of(codebook, unpack(packed, bits, in_features))
    if zero is not None:
        value = value + _spread(_at_least_float32(zero) * codebook[..., 1:2], block_size, in_features)
    value = value * _spread(scale, block_size, in_features)
    if out is not None:
        return out.copy_(value)
    return value if dtype is None else value.to(dtype)


def _at_least_float32(stored: Tensor) -> Tensor:
    return stored.to(torch.promote_types(stored.dtype, torch.float32))


def few_tokens(dtype: torch.dtype) -> int:
    """None: the product writes the matrix first."""
    return 0


def product(
    x: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Tensor:
    """x (tokens, in) Wᵀ."""
    return (x.float() @ dequantize(packed, scale, codebook, zero, bits, block_size, x.shape[1]).T).to(x.dtype)


def grad_product(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
) -> Tensor:
    """grad (tokens, rows) W."""
    dense = dequantize(packed, scale, codebook, zero, bits, block_size, in_features)
    return (grad.float() @ dense).to(grad.dtype)


def levels_of(codebook: Tensor, codes: Tensor) -> Tensor:
    """The levels of (rows, ...) codes; a codebook may have a row for each row."""
    if codebook.dim() == 1:
        return codebook[codes.long()]
    return codebook.gather(1, codes.long().flatten(1)).view(codes.shape)


def _nearest(x: Tensor, thresholds: Tensor) -> Tensor:
    """Codes of (rows, ...) numbers in units of the levels."""
    if thresholds.dim() == 1:
        return torch.bucketize(x.contiguous(), thresholds)
    return torch.searchsorted(thresholds.contiguous(), x.flatten(1).contiguous()).view(x.shape)


def _middle(codebook: Tensor) -> Tensor:
    """Code of the level nearest to 0: of shape (1,), or (rows, 1)."""
    return codebook.abs().argmin(-1, keepdim=True)


def encode(
    weight: Tensor, scale: Tensor, zero: Tensor | None, codebook: Tensor, thresholds: Tensor, block_size: int
) -> Tensor:
    n = weight.shape[1]
    spread = _spread(scale, block_size, n)
    x = weight / spread
    if zero is not None:
        x = x - _spread(zero * codebook[..., 1:2], block_size, n)
    return torch.where(spread == 0, _middle(codebook), _nearest(x, thresholds)).to(torch.uint8)


def search_scale(
    weight: Tensor,
    importance: Tensor,
    codebook: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    refine: int,
    block_size: int,
) -> Tensor:
    blocks = _blocks(weight, block_size)
    valid = _blocks(importance[None], block_size).nan_to_num(0.0)
    blocks = blocks.nan_to_num(0.0)
    start_scale = blocks.abs().amax(-1) / codebook.abs().amax(-1, keepdim=True)

    def fit(candidate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = blocks * (1 / candidate).unsqueeze(-1)
        levels = levels_of(codebook, _nearest(scaled, thresholds))
        rest, weighted = scaled - levels, levels * valid
        return (rest * weighted).sum(-1), (levels * weighted).sum(-1), (rest * rest * valid).sum(-1)

    best, best_score = start_scale.clone(), torch.full_like(start_scale, float("inf"))
    for factor in factors:
        num, den, error = fit(start_scale * factor)
        score = factor * factor * (error - num / den * num)
        better = (den > 0) & (score < best_score)
        best_score = torch.where(better, score, best_score)
        best = torch.where(better, start_scale * factor * (1 + num / den), best)
    for _ in range(refine):
        num, den, _ = fit(best)
        best = torch.where((den > 0) & (best != 0), best * (1 + num / den), best)
    return torch.where(start_scale < TINY, start_scale, best)


def search_affine(
    weight: Tensor,
    importance: Tensor,
    codebook: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    refine: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    blocks = _blocks(weight, block_size)
    valid = _blocks(importance[None], block_size).nan_to_num(0.0)
    count = valid.sum(-1)
    low = blocks.nan_to_num(float("inf")).amin(-1)
    high = blocks.nan_to_num(float("-inf")).amax(-1)
    blocks = blocks.nan_to_num(0.0)
    middle = (high + low) * 0.5
    span = codebook[-1]

    def fit(slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (blocks - offset.unsqueeze(-1)) * (1 / slope).unsqueeze(-1)
        levels = codebook[_nearest(x.contiguous(), thresholds)]
        mean_level, mean = (levels * valid).sum(-1) / count, (blocks * valid).sum(-1) / count
        centred = levels - mean_level.unsqueeze(-1)
        num = ((blocks - mean.unsqueeze(-1)) * centred * valid).sum(-1)
        den = (centred * centred * valid).sum(-1)
        slope = torch.where(den > 0, num / den, torch.zeros_like(num))
        return slope, mean - slope * mean_level, num * slope

    slope, offset = torch.zeros_like(middle), middle
    score = torch.full_like(middle, -1.0)
    for factor in factors:
        start = (high - low) * factor / span
        s, o, explained = fit(start, middle - start * span * 0.5)
        better = (s > 0) & (explained > score)
        slope, offset, score = (torch.where(better, a, b) for a, b in ((s, slope), (o, offset), (explained, score)))
    for _ in range(refine):
        s, o, explained = fit(slope, offset)
        better = (s > 0) & (explained >= score) & (slope > 0)
        slope, offset, score = (torch.where(better, a, b) for a, b in ((s, slope), (o, offset), (explained, score)))
    constant = (high == low) | (slope == 0)  # or too close to it for float32 to tell levels apart
    scale = torch.where(constant, middle.abs() / codebook[1], slope)
    zero = torch.where(constant, middle.sign(), offset / (slope * codebook[1]))
    return scale, zero


def level_moments(
    weight: Tensor, importance: Tensor, scale: Tensor, codes: Tensor, levels: int, block_size: int, by_row: bool = False
) -> tuple[Tensor, Tensor]:
    """For each level k: sum of h * scale * w and sum of h * scale^2 over the elements with code k, float64."""
    spread = _spread(scale, block_size, weight.shape[1]).double()
    weighted = spread * importance.double()
    num = torch.zeros(weight.shape[0], levels, dtype=torch.float64, device=weight.device)
    den = torch.zeros_like(num)
    num.scatter_add_(1, codes.long(), weighted * weight.double())
    den.scatter_add_(1, codes.long(), weighted * spread)
    return (num, den) if by_row else (num.sum(0), den.sum(0))


def feedback(
    work: Tensor,
    inverse: Tensor,
    order: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    columns: tuple[int, int],
    codes: Tensor,
    dense: Tensor,
) -> Tensor:
    begin, end = columns
    errors = torch.empty(work.shape[0], end - begin, dtype=work.dtype, device=work.device)
    for j in range(begin, end):
        i = int(order[j])
        codes[:, i], dense[:, i] = _nearest_value(work[:, j], i // block_size, scale, zero, codebook, thresholds)
        error = (work[:, j] - dense[:, i]) / inverse[j, j]
        work[:, j + 1 : end] -= error[:, None] * inverse[j, j + 1 : end]
        errors[:, j - begin] = error
    return errors


def _nearest_value(
    x: Tensor, block: int, scale: Tensor, zero: Tensor | None, codebook: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor]:
    s = scale[:, block : block + 1]
    offset = torch.zeros_like(s) if zero is None else zero[:, block : block + 1] * codebook[..., 1:2]
    code = _nearest(x[:, None] / torch.where(s == 0, 1, s) - offset, thresholds)
    code = torch.where(s == 0, _middle(codebook), code)
    return code[:, 0].to(torch.uint8), (s * (levels_of(codebook, code) + offset))[:, 0]


def descend(
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    codes: Tensor,
    dense: Tensor,
    sweeps: int,
    refit: bool,
) -> None:
    n = gradient.shape[1]
    for _ in range(sweeps):
        for block in range(scale.shape[1]):
            inside = slice(block * block_size, min((block + 1) * block_size, n))
            for j in range(inside.start, inside.stop):
                wanted = dense[:, j] + gradient[:, j] / hessian[j, j]
                code, value = _nearest_value(wanted, block, scale, zero, codebook, thresholds)
                moved = (code != codes[:, j]) & (scale[:, block] != 0)
                step = torch.where(moved, value - dense[:, j], 0.0)
                codes[:, j] = torch.where(moved, code, codes[:, j])
                dense[:, j] += step
                gradient -= step[:, None] * hessian[j]
            if refit:
                offset = 0.0 if zero is None else zero[:, block : block + 1] * codebook[..., 1:2]
                levels = levels_of(codebook, codes[:, inside]) + offset
                num = (levels * gradient[:, inside]).sum(1)
                den = ((levels @ hessian[inside, inside]) * levels).sum(1)
                worthwhile = (den > 0) & (num.abs() > 2.0**-10 * scale[:, block].abs() * den)
                step = torch.where(worthwhile & (scale[:, block] != 0), num / den.clamp_min(1e-30), 0.0)
                scale[:, block] += step
                moves = step[:, None] * levels
                dense[:, inside] += moves
                gradient -= moves @ hessian[inside]


def descend_coupled(
    error: Tensor,
    hessian: Tensor,
    coupling: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    codes: Tensor,
    dense: Tensor,
    refit: bool,
) -> None:
    product = error @ hessian
    for r in range(error.shape[0]):
        row = slice(r, r + 1)
        gradient = (coupling[row] / coupling[r, r]) @ product
        before = gradient.clone()
        zeros = None if zero is None else zero[row]
        own, borders = (t if t.dim() == 1 else t[row] for t in (codebook, thresholds))
        state = (scale[row], zeros, own, borders, block_size, codes[row], dense[row])
        descend(gradient, hessian, *state, 1, refit)
        product[row] += gradient - before

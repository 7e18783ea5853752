"""LoftQ's Algorithm 1 and its NormalFloat quantizer, written out in float64 from the papers' mathematics alone.

Nothing here comes from the package under test. Sources: QLoRA (arXiv 2305.14314, section 3) for the codebook and its
published offset; LoftQ (arXiv 2310.08659, section 3, Algorithm 1) for the rest. Notation is LoftQ's: W (d1, d2) is
approximated by Q + A B^T with A (d1, r) and B (d2, r).
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

OFFSET = 0.9677083


def normal_float(bits: int) -> np.ndarray:
    """The 2^bits levels: normal quantiles, one more of them positive than negative, a 0, scaled to 1."""
    half = 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf
    step = OFFSET - 0.5
    positive = [quantile(OFFSET - i * step / half) for i in range(half)]
    negative = [-quantile(OFFSET - i * step / (half - 1)) for i in range(half - 1)]
    return np.array(sorted([*negative, 0.0, *positive])) / max(positive)


def quantize(W: np.ndarray, bits: int, block_size: int = 64) -> np.ndarray:
    """q_N: blocks of consecutive elements, each divided by its largest magnitude and rounded to the nearest level."""
    levels = normal_float(bits)
    blocks = W.reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    normalised = blocks / np.where(absmax == 0, 1, absmax)
    codes = np.abs(normalised[:, :, None] - levels).argmin(axis=2)
    return (absmax * levels[codes]).reshape(W.shape)


def truncated_svd(residual: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A = U sqrt(sigma), B = V sqrt(sigma), the largest ``rank`` singular values of each."""
    U, sigma, Vt = np.linalg.svd(residual, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    return U[:, :rank] * root, Vt[:rank].T * root


def algorithm_1(
    W: np.ndarray, bits: int, rank: int, T: int, block_size: int = 64, svd_first: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """Q_T, A_T, B_T and the relative error |W - Q_t - A_t B_t^T| / |W| after every step t = 1 ... T.

    ``svd_first`` swaps the two lines of the loop (Table 6), starting from Q_0 = 0.
    """
    W = W.astype(np.float64)
    Q = np.zeros_like(W)
    A = np.zeros((W.shape[0], rank))
    B = np.zeros((W.shape[1], rank))
    errors = []
    for _ in range(T):
        if svd_first:
            A, B = truncated_svd(W - Q, rank)
            Q = quantize(W - A @ B.T, bits, block_size)
        else:
            Q = quantize(W - A @ B.T, bits, block_size)
            A, B = truncated_svd(W - Q, rank)
        errors.append(float(np.linalg.norm(W - Q - A @ B.T) / np.linalg.norm(W)))
    return Q, A, B, errors

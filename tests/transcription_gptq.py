"""Data-aware rounding and low-rank correction, written out in float64 from the papers' mathematics alone.

Nothing here comes from the package under test. Sources: GPTQ (arXiv 2210.17323, Algorithm 1) for rounding with error
feedback; QERA (arXiv 2410.06040) and CLoQ (arXiv 2501.18475) for the closed form of the adapter, with the symmetric root
of H; CALDERA (arXiv 2405.18886, Algorithm 1) for their alternation. W is (out, in), H = E[x xᵀ] (in, in).
"""

from __future__ import annotations

import numpy as np

from transcription import normal_float

Array = np.ndarray


def damped(H: Array, share: float) -> Array:
    """H + share * tr(H) / d * I: GPTQ's percdamp, CLoQ's λ."""
    return H + share * np.trace(H) / len(H) * np.eye(len(H))


def blended(H: Array, weight: float) -> Array:
    """(1 - λ) H d / tr(H) + λ I."""
    return (1 - weight) * H * len(H) / np.trace(H) + weight * np.eye(len(H))


def act_order(H: Array) -> Array:
    """Columns of large second moment first."""
    return np.argsort(-np.diag(H), kind="stable")


def gptq(W: Array, H: Array, grid: Array, order: Array) -> tuple[Array, Array]:
    """Q, and the values that were rounded to it.

    Column j in the order goes to its nearest grid value; its error over U_jj, times row j of U, is taken out of the
    columns that follow, where ``H⁻¹ = Uᵀ U``, U upper triangular, is the Cholesky factorisation of the inverse Hessian.

    Args:
        grid: (out, in, levels) what each element may become.
    """
    inverse = np.linalg.inv(H[np.ix_(order, order)])
    U = np.linalg.cholesky((inverse + inverse.T) / 2).T
    work = W.astype(np.float64)[:, order]
    Q = np.empty_like(work)
    for j, column in enumerate(order):
        candidates = grid[:, column]
        nearest = np.abs(candidates - work[:, j, None]).argmin(1)
        Q[:, j] = np.take_along_axis(candidates, nearest[:, None], 1)[:, 0]
        error = (work[:, j] - Q[:, j]) / U[j, j]
        work[:, j + 1 :] -= np.outer(error, U[j, j + 1 :])
    back = np.argsort(order)
    return Q[:, back], work[:, back]


def absmax_grid(W: Array, bits: int, block_size: int = 64) -> Array:
    """(out, in, 2^bits) NormalFloat levels times the largest magnitude of each block of a row."""
    absmax = np.abs(W.reshape(W.shape[0], -1, block_size)).max(2)
    return np.repeat(absmax, block_size, 1)[:, :, None] * normal_float(bits)


def roots(H: Array) -> tuple[Array, Array]:
    """H^½ and H^-½, symmetric."""
    values, vectors = np.linalg.eigh(H)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T


def factors(R: Array, rank: int, root: Array, unroot: Array) -> tuple[Array, Array]:
    """U √S and √S Vᵀ unroot of the SVD of R root: their product is the rank-r L nearest to R in the norm of H."""
    U, sigma, Vt = np.linalg.svd(R @ root, full_matrices=False)
    scale = np.sqrt(sigma[:rank])
    return U[:, :rank] * scale, scale[:, None] * Vt[:rank] @ unroot


def low_rank(R: Array, rank: int, H: Array) -> Array:
    """SVD_r(R H^½) H^-½."""
    left, right = factors(R, rank, *roots(H))
    return left @ right


def objective(W: Array, approximation: Array, H: Array) -> float:
    """|(W - approximation) H^½| / |W H^½|."""
    error = W - approximation
    return float(np.sqrt(np.sum((error @ H) * error) / np.sum((W @ H) * W)))


def caldera(W: Array, H: Array, bits: int, rank: int, T: int, block_size: int = 64) -> tuple[list[Array], list[Array]]:
    """Q_t and L_t for t = 1 ... T: Q <- GPTQ(W - L), L <- the closed form for W - Q, its factors rounded to float16."""
    W = W.astype(np.float64)
    root, unroot = roots(H)
    order = act_order(H)
    L = np.zeros_like(W)
    Qs, Ls = [], []
    for _ in range(T):
        Q, _ = gptq(W - L, H, absmax_grid(W - L, bits, block_size), order)
        left, right = factors(W - Q, rank, root, unroot)
        L = left.astype(np.float16).astype(np.float64) @ right.astype(np.float16).astype(np.float64)
        Qs.append(Q)
        Ls.append(L)
    return Qs, Ls

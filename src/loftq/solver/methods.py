"""Named settings of the alternation, as data: what was published, and where this program differs from it.

Whatever the method, Q is stored as the :class:`loftq.QuantSpec` says, the adapter in float32, LoRA's scaling is divided
out of its factors, and the best iterate under the method's own objective is kept, plain quantization being iterate 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loftq.config import METHODS as NAMES
from loftq.config import one_of


@dataclass(frozen=True)
class Method:
    """One way to choose Q and the adapter.

    Attributes:
        source: where it was published.
        difference: what is done otherwise here.
        steps: number of alternations, ``None`` for ``num_iter``; 0 leaves the adapter as PEFT initialises it.
        svd_first: L <- SVD_r(W - Q) before Q <- quantize(W - L) in each step, instead of after it.
        principal_start: start from L = SVD_r(W) instead of L = 0.
        preserve: keep the k largest directions of W in the adapter and choose k (SRR).
        metric: the norm that the SVD and the choice of iterate minimise: ``none`` (the weight error), ``mean-abs``,
            ``diagonal``, ``full`` or ``fisher``; see :class:`loftq.solver.importance.Metric`.
        damping: λ of ``H_λ``, unless the user chooses another.
        row_damping: γ of ``G_γ`` where the gradients in the outputs are known; ``None`` does without them.
        guidance: μ, the share of the inputs counted by those gradients.
        feedback: round with error feedback (GPTQ) instead of to the nearest level.
        sweeps: of coordinate descent after the feedback.
        follow_drift: aim at the full-precision layer's outputs where the inputs come from quantized layers.
        half_adapter: round the adapter to float16.
        candidates: of ``auto``.
    """

    source: str
    difference: str = ""
    steps: int | None = None
    svd_first: bool = False
    principal_start: bool = False
    preserve: bool = False
    metric: str = "none"
    damping: float = 0.0
    row_damping: float | None = None
    guidance: float = 0.0
    feedback: bool = False
    sweeps: int = 0
    follow_drift: bool = False
    half_adapter: bool = False
    candidates: tuple[str, ...] = ()

    @property
    def needs_inputs(self) -> bool:
        """Whether it works on statistics of the layers' inputs."""
        return self.metric != "none" or bool(self.candidates)

    @property
    def needs_gradients(self) -> bool:
        return self.metric == "fisher"


# CLoQ's damping, 0.01 tr(H) / d, written as a blend: the same matrix up to a factor.
_CLOQ = 0.01 / 1.01
_OURS = 0.005
_OURS_ROWS = 0.3
_OURS_GUIDANCE = 0.5

_DATA = Method(
    "this project",
    metric="full",
    damping=_OURS,
    row_damping=_OURS_ROWS,
    guidance=_OURS_GUIDANCE,
    principal_start=True,
    feedback=True,
    sweeps=1,
    follow_drift=True,
)

METHODS = {
    "loftq": Method("LoftQ, Algorithm 1 (arXiv 2310.08659)", "the published loop returns its last iterate"),
    "loftq-svd-first": Method("LoftQ, Table 6 (arXiv 2310.08659)", svd_first=True),
    "qlora": Method("QLoRA (arXiv 2305.14314)", steps=0),
    "rtn": Method(
        "round to nearest, no adapter", "the same as qlora: PEFT's default adapter, which is written, adds nothing", 0
    ),
    "gptq": Method(
        "GPTQ (arXiv 2210.17323), no adapter",
        "scales are searched before the first column; all layers' inputs are the full-precision model's unless propagated",
        steps=0,
        metric="full",
        damping=_CLOQ,
        feedback=True,
    ),
    "pissa": Method(
        "PiSSA (arXiv 2404.02948), QPiSSA's first step: L = SVD_r(W), Q = quantize(W - L)", steps=1, svd_first=True
    ),
    "qpissa": Method("QPiSSA with num_iter steps (arXiv 2404.02948, appendix)", principal_start=True),
    "lqer": Method(
        "LQER (arXiv 2402.02446)", "scales are not normalised to their geometric mean", 1, metric="mean-abs"
    ),
    "qera-approx": Method("QERA-approx (arXiv 2410.06040)", "any codebook instead of MXINT", 1, metric="diagonal"),
    "qera": Method(
        "QERA-exact (arXiv 2410.06040)",
        "any codebook instead of MXINT; a triangular factor of H instead of its square root, which gives the same product",
        1,
        metric="full",
    ),
    "cloq": Method(
        "CLoQ (arXiv 2501.18475)",
        "any codebook, searched scales; a triangular factor of H",
        1,
        metric="full",
        damping=_CLOQ,
        feedback=True,
    ),
    "caldera": Method(
        "CALDERA (arXiv 2405.18886)",
        "Q by GPTQ's feedback without incoherence processing, adapters in 16 bits rather than 4",
        metric="full",
        damping=_CLOQ,
        feedback=True,
        half_adapter=True,
    ),
    "lq-lora": Method(
        "LQ-LoRA (arXiv 2311.12023), Fisher-weighted",
        "the best iterate, not the one before the first increase; no bits per layer (that is `loftq plan`)",
        metric="fisher",
        svd_first=True,
    ),
    "srr": Method(
        "SRR: preserve, then correct",
        "k is chosen among five shares of the rank by the objective itself rather than by a proxy",
        1,
        preserve=True,
        metric="full",
    ),
    "loftq-data": _DATA,
    "loftq-data-zero": replace(_DATA, difference="loftq-data from L = 0", principal_start=False),
    "auto": Method(
        "this project: the best of its candidates for each layer, under the objective of loftq-data",
        metric="full",
        damping=_OURS,
        row_damping=_OURS_ROWS,
        guidance=_OURS_GUIDANCE,
        follow_drift=True,
        candidates=(
            "loftq-data",
            "caldera",
            "cloq",
            "srr",
            "qera",
            "qera-approx",
            "lqer",
            "qpissa",
            "loftq",
            "gptq",
            "rtn",
        ),
    ),
}
assert tuple(METHODS) == NAMES


def method_named(name: str) -> Method:
    """The :class:`Method` of that name, or a ``ConfigError`` that lists the names."""
    return METHODS[one_of("method", name, METHODS)]

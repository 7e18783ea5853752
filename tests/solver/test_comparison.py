"""Which method is better than which on a real layer, under one objective computed in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from torch import Tensor

import transcription_gptq as reference
from loftq.config import QuantSpec
from loftq.solver import Decomposition, decompose
from loftq.solver.importance import InputStatistics
from loftq.solver.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

WIDEST = 640  # columns; factors of the FFN's 1536 take seconds
OURS = METHODS["loftq-data"].damping  # λ, that of auto too


def dense_of(result: Decomposition) -> Tensor:
    """Float64 Q + scaling B A."""
    product = result.lora_B.double() @ result.lora_A.double()
    return result.quantized.dequantize().double() + result.scaling * product


def narrowed(statistics: InputStatistics) -> InputStatistics:
    """Of the first inputs alone."""
    drift = None if statistics.drift is None else statistics.drift[:WIDEST, :WIDEST]
    moment = statistics.second_moment[:WIDEST, :WIDEST]
    return InputStatistics(moment, mean_abs=statistics.mean_abs[:WIDEST], drift=drift)


class Judge:
    """loftq-data's objective, the full-precision layer's outputs on the drifted inputs being the target."""

    def __init__(self, statistics: InputStatistics) -> None:
        moment = statistics.second_moment.double().numpy()
        self.H = reference.blended(moment, OURS)
        self.drift = None
        if statistics.drift is not None:
            scale = (1 - OURS) * len(moment) / np.trace(moment)
            self.drift = scale * np.linalg.solve(self.H, statistics.drift.double().numpy().T).T

    def objective(self, weight: Tensor, result: Decomposition) -> float:
        W = weight.double().numpy()
        target = W if self.drift is None else W + W @ self.drift
        error = target - dense_of(result).numpy()
        return float(np.sqrt(np.sum((error @ self.H) * error) / np.sum((W @ self.H) * W)))


@pytest.mark.parametrize("drifted", [False, True], ids=["clean", "drifted"])
def test_auto_is_never_worse_than_its_candidates(minilm_layer2, minilm_statistics, minilm_drifted, drifted):
    judges = {}
    for name, whole in minilm_layer2.items():
        statistics = minilm_drifted[name][1] if drifted else minilm_statistics[name]
        weight = whole[:48, :WIDEST].contiguous()
        if whole.shape[1] > WIDEST:
            statistics = narrowed(statistics)
        judge = judges.setdefault(id(statistics), Judge(statistics))
        fixed = {"rank": 8, "num_iter": 1, "importance": statistics}
        auto = decompose(weight, QuantSpec(2), method="auto", **fixed)
        found = judge.objective(weight, auto)
        assert auto.objective == pytest.approx(found, rel=1e-4)
        for candidate in METHODS["auto"].candidates:
            other = judge.objective(weight, decompose(weight, QuantSpec(2), method=candidate, **fixed))
            assert found <= other * (1 + 1e-5), f"{name}: {auto.method} {found:.5f}, {candidate} {other:.5f}"


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits}bit")
def test_ours_is_better_than_its_peers(minilm_layer2, minilm_statistics, bits):
    for name, whole in minilm_layer2.items():
        if whole.shape[1] > WIDEST:
            continue
        weight, statistics = whole[:96].contiguous(), minilm_statistics[name]
        fixed = {"rank": 16, "num_iter": 2, "importance": statistics}
        ours, *others = (
            Judge(statistics).objective(weight, decompose(weight, QuantSpec(bits), method=method, **fixed))
            for method in ("loftq-data", "caldera", "cloq", "qera", "srr")
        )
        assert ours <= min(others), f"{name}: {ours:.4f} against {others}"


def test_drift_lowers_the_error_of_the_outputs(minilm_layer2, minilm_inputs, minilm_drifted):
    for name, whole in itertools.islice(minilm_layer2.items(), 3):
        weight = whole[:128].contiguous()
        inputs, statistics = minilm_drifted[name]
        blind = InputStatistics(statistics.second_moment)
        wanted = minilm_inputs[name].double() @ weight.double().T
        errors = []
        for given_statistics in (statistics, blind):
            result = decompose(weight, QuantSpec(3), rank=16, num_iter=2, importance=given_statistics)
            errors.append(float((inputs.double() @ dense_of(result).T - wanted).norm() / wanted.norm()))
        assert errors[0] < errors[1], f"{name}: {errors[0]:.4f} with the drift, {errors[1]:.4f} without"

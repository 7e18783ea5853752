"""Layers that share an input, as the passes over a calibration text give them out."""

from __future__ import annotations

from collections.abc import Callable

from loftq.solver.importance import InputStatistics


class Group:
    """Layers that share their input.

    Attributes:
        names: the layers, in the order in which they are called; or one parameter with the experts of a layer.
        experts: the statistics of every expert, if it is such a parameter; :meth:`statistics` are those of all together.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        compute: Callable[[], InputStatistics],
        experts: list[InputStatistics] | None = None,
    ) -> None:
        self.names = names
        self.experts = experts
        self._compute: Callable[[], InputStatistics] | None = compute
        self._result: InputStatistics | None = None

    def statistics(self) -> InputStatistics:
        """The statistics of the shared input, computed on the first call.

        Raises:
            SourceError: an input has NaN or infinite elements.
            ConfigError: with ``propagate=True``, if the next group has been asked for already.
        """
        if self._result is None:
            assert self._compute is not None
            self._result = self._compute()
            self._compute = None
        return self._result

    def by_name(self) -> dict[str, InputStatistics]:
        """The statistics of every layer, of experts each one's under the parameter's name and its number."""
        if self.experts is None:
            return dict.fromkeys(self.names, self.statistics())
        return {f"{self.names[0]}.{expert}": statistics for expert, statistics in enumerate(self.experts)}


def identity(value: InputStatistics) -> InputStatistics:
    """Statistics that are known already."""
    return value

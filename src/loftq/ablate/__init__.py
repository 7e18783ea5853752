"""Ablations: what each choice of the method does to the initialisation and to what is measured on it.

>>> from loftq.ablate import Ablation, Sweep, ablate
>>> sweep = Sweep(bits=(2, 3, 4), iters=(0, 1, 5))
>>> rows = [row for row, _ in ablate(Ablation("MODEL", sweep, text="text.txt"), "OUT")]  # doctest: +SKIP
"""

from loftq.ablate.factors import Factors, Sweep
from loftq.ablate.run import ablate
from loftq.ablate.settings import Ablation
from loftq.ablate.table import Row

__all__ = ["Ablation", "Factors", "Row", "Sweep", "ablate"]

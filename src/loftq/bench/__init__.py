"""How fast the packed layers and the solver are: ``loftq bench``.

Each suite yields :class:`~loftq.bench.case.Case` after case; :mod:`loftq.bench.bounds` says what the medians are held to.
"""

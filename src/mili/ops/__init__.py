"""The network's operations as checked Python functions, one for each Mojo kernel.

Each function checks dtypes, ranks and known dimensions and then places one custom op in the graph under construction.
It knows nothing of checkpoints or requests. Invariant: a mistake that the graph compiler would report late, or not at
all, raises `ValueError` here with the glossary's words.
"""

"""Model in and out: reading with every check, writing atomically, and the kinds of object a model is given as.

Bad input ends in one :class:`graphprune.errors.ModelError` with one line: what is wrong, where, and what to do.
"""

from graphprune.model.kinds import as_ir, copy, to_proto
from graphprune.model.read import ConversionWarning, load
from graphprune.model.write import StagedFile, file_size, save, staged

__all__ = [
    "ConversionWarning",
    "StagedFile",
    "as_ir",
    "copy",
    "file_size",
    "load",
    "save",
    "staged",
    "to_proto",
]

"""Where jobs come from: the published CSV form, public cluster traces, and a seeded generator."""

from lightning_easyscale.simulation.traces.easyscale import read_easyscale
from lightning_easyscale.simulation.traces.generator import SHAPES, Shape, generate
from lightning_easyscale.simulation.traces.public import READERS, read_public
from lightning_easyscale.simulation.traces.table import BadRow
from lightning_easyscale.simulation.traces.trace import RawJob, Trace, assign, d2_friendly

__all__ = [
    "READERS",
    "SHAPES",
    "BadRow",
    "RawJob",
    "Shape",
    "Trace",
    "assign",
    "d2_friendly",
    "generate",
    "read_easyscale",
    "read_public",
]

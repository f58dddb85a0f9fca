"""Input statistics: what criteria and solvers know about the inputs X (tokens x in) of a matrix.

`collect` watches a model while somebody runs it, `collect_pairs` two runs of it side by side, dense and recovered.
"""

from recon.statistics.collection import collect
from recon.statistics.inputs import InputStatistics, Need
from recon.statistics.pairs import Pairs, collect_pairs
from recon.statistics.precision import full_fp32

__all__ = ["InputStatistics", "Need", "Pairs", "collect", "collect_pairs", "full_fp32"]

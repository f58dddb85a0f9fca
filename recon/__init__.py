"""recon: repair pruned language models at four scopes and measure what each buys and costs.

Importing this package has no side effects and imports neither torch nor lightning; the README says
in which order to read its modules.
"""

__version__ = "0.1.0"

"""flexpert: an elastic serving cluster for Mixture-of-Experts language models.

This module stays empty of imports, so that the HBM manager's daemon and the pure packages start in milliseconds.
"""

__version__ = "0.1.0"

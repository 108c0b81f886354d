"""AFD: an attention-FFN disaggregated inference cluster service."""

__version__ = "0.1.0"

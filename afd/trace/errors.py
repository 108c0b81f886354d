"""What can go wrong with a trace."""

from afd.errors import AfdError


class TraceError(AfdError):
    """There is no trace to show: names the worker or the file, and what to do."""

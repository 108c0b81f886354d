"""Where ranks that know only one address meet: `gather` is a barrier that hands everybody what everybody brought.

For tools and programs without a control plane of their own (`python -m stepmesh m2n`, `stepmesh.compat`). A mesh does
not need it: it takes its members from those who know them.
"""

from stepmesh.rendezvous.client import RendezvousClient
from stepmesh.rendezvous.server import RendezvousServer

__all__ = ["RendezvousClient", "RendezvousServer"]

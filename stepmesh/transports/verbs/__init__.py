"""RDMA: reliable-connected queue pairs over the verbs of rdma-core (InfiniBand, RoCE, Soft-RoCE)."""

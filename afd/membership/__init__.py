"""How a process is a member of the cluster: the client of the coordinator, the thread that reports, TLS."""

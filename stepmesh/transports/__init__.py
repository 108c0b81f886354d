"""Transports: how control frames and transfer slots cross between two ranks. `base` states the contract."""

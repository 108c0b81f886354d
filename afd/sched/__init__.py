"""Scheduling on the attention worker: pure decision code (no tensor, socket, thread or clock)."""

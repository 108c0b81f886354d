"""Attention worker: requests, KV cache, attention, norms, router, LM head, sampling, its scheduler."""

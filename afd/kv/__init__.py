"""KV cache: block pool (pure), cache tensors."""

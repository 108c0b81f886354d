"""FFN worker: gangs, merged batches, its shard of the FFN layers; stateless towards requests."""

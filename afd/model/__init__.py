"""Models split in two halves: spec, weights, attention half, FFN half, sampling, the in-process reference.

`spec`, `inventory`, `sharding`, `families`, `weights`, `loading`, `presets` and `tokenizer_files` import no torch, so
the gateway, the coordinator and the CLI may use them.
"""

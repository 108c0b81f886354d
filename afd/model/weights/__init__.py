"""Where weights come from: safetensors folders, GGUF files, seeded random numbers. numpy only, no torch."""

"""`afd bench`: load generator and latency report for any OpenAI-compatible endpoint. No torch."""

"""The chips and models that the Step-3 report compares: what the tables and figures show unless asked otherwise."""

from __future__ import annotations

REPORT_CHIPS = ("h800", "h20", "a800", "910b")
REPORT_MODELS = (
    "deepseek-v3",
    "kimi-k2",
    "qwen3-235b-a22b",
    "qwen3-32b",
    "llama4-maverick",
    "minimax-m1",
    "ernie-4.5-300b",
    "pangu-pro-moe",
    "step3",
)

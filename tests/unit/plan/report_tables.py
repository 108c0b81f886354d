"""Oracle values transcribed from the Step-3 system report (arXiv 2507.19427v1). Nothing here is computed.

Names: the planner's model and chip names. Tables 2, 3, 5, 6, 7, 8, 9 and the arithmetic intensities.
"""

CHIPS = ("h800", "h20", "a800", "910b")

# Table 2, per decoded token at 8K: KV or state bytes, attention FLOPs, linear FLOPs, FFN FLOPs.
TABLE_2 = {
    "deepseek-v3": (2.88e8, 1.47e11, 2.28e10, 4.84e10),
    "kimi-k2": (2.88e8, 7.37e10, 1.23e10, 4.84e10),
    "qwen3-235b-a22b": (7.89e8, 2.52e10, 1.34e10, 2.84e10),
    "qwen3-32b": (1.07e9, 1.72e10, 1.21e10, 5.03e10),
    "llama4-maverick": (1.01e9, 8.05e9, 6.04e9, 2.42e10),
    "minimax-m1": (9.23e8, 3.42e9, 3.75e10, 5.44e10),
    "ernie-4.5-300b": (9.06e8, 1.45e10, 1.63e10, 7.61e10),
    "pangu-pro-moe": (8.05e8, 8.05e9, 6.04e9, 2.38e10),
    "step3": (2.56e8, 3.27e10, 2.07e10, 5.33e10),
}

# Table 3, per decoded token at 32K: KV or state bytes, attention FLOPs.
TABLE_3 = {
    "deepseek-v3": (1.15e9, 5.89e11),
    "kimi-k2": (1.15e9, 2.95e11),
    "qwen3-235b-a22b": (3.15e9, 1.01e11),
    "qwen3-32b": (4.29e9, 6.87e10),
    "llama4-maverick": (2.21e9, 1.41e10),
    "minimax-m1": (1.93e9, 1.15e10),
    "ernie-4.5-300b": (3.62e9, 5.80e10),
    "pangu-pro-moe": (3.22e9, 3.22e10),
    "step3": (1.02e9, 1.31e11),
}

# Table 4: FLOP per byte at the roofline's knee.
ROOFLINE = {"h800": 591, "h20": 74, "a800": 156, "910b": 175}

# Table 5: USD per FLOP, USD per byte. The H800's 2.80e-19 is 2.806e-19 cut off, not rounded.
TABLE_5 = {
    "h800": (2.80e-19, 1.66e-16),
    "h20": (7.51e-19, 5.56e-17),
    "a800": (6.68e-19, 1.04e-16),
    "910b": (6.65e-19, 1.16e-16),
}

# Table 6, USD per 1e6 decoded tokens: attention at 8K, attention at 32K, FFN; each on H800, H20, A800, 910B.
TABLE_6 = {
    "deepseek-v3": ((0.054, 0.128, 0.114, 0.113), (0.197, 0.460, 0.409, 0.407), (0.014, 0.036, 0.032, 0.032)),
    "kimi-k2": ((0.051, 0.065, 0.057, 0.057), (0.194, 0.231, 0.205, 0.204), (0.014, 0.036, 0.032, 0.032)),
    "qwen3-235b-a22b": ((0.135, 0.054, 0.091, 0.101), (0.527, 0.185, 0.338, 0.376), (0.008, 0.021, 0.019, 0.019)),
    "qwen3-32b": ((0.181, 0.069, 0.120, 0.133), (0.716, 0.248, 0.455, 0.508), (0.014, 0.038, 0.034, 0.033)),
    "llama4-maverick": ((0.169, 0.060, 0.109, 0.121), (0.369, 0.128, 0.235, 0.262), (0.007, 0.018, 0.016, 0.016)),
    "minimax-m1": ((0.164, 0.079, 0.121, 0.132), (0.330, 0.135, 0.226, 0.249), (0.015, 0.041, 0.036, 0.036)),
    "ernie-4.5-300b": ((0.155, 0.063, 0.105, 0.116), (0.606, 0.214, 0.388, 0.432), (0.021, 0.057, 0.051, 0.051)),
    "pangu-pro-moe": ((0.135, 0.049, 0.088, 0.098), (0.536, 0.183, 0.340, 0.379), (0.007, 0.018, 0.016, 0.016)),
    "step3": ((0.048, 0.040, 0.040, 0.043), (0.176, 0.114, 0.120, 0.133), (0.015, 0.040, 0.036, 0.035)),
}

# Totals that the text and Fig. 1/2 quote: AFD with the best chip for each part, 8K and 32K.
AFD_TOTALS = {
    "deepseek-v3": (0.068, 0.211),
    "kimi-k2": (0.065, 0.208),
    "qwen3-235b-a22b": (0.062, 0.193),
    "qwen3-32b": (0.083, 0.262),
    "llama4-maverick": (0.067, 0.134),
    "minimax-m1": (0.095, 0.151),
    "ernie-4.5-300b": (0.084, 0.235),
    "pangu-pro-moe": (0.056, 0.190),
    "step3": (0.055, 0.129),
}

# Fig. 3: KV per request in GB at 8K, 32K, 128K, and all-H800 cost. Read to the digits shown.
FIGURE_3 = {
    "step3": ((0.256, 1.02, 4.09), (0.063, 0.190, 0.700)),
    "minimax-m1": ((0.92, 1.93, 5.96), (0.179, 0.346, 1.013)),
    "llama4-maverick": ((1.01, 2.22, 7.05), (0.175, 0.376, 1.177)),
}

# Table 7: minimum sparsity of an MoE for good MFU with hidden communication, hidden 7168, 61 layers.
TABLE_7 = {"h800": 0.058, "h20": 0.007, "a800": 0.031, "910b": 0.034}

# The H800's bound at the 40 GB/s per NIC that DeepEP measures.
SPARSITY_H800_AT_40_GB = 0.073

# Sparsity of published models: active over all experts, the shared expert counted.
SPARSITY = {
    "step3": 4 / 49,
    "deepseek-v3": 9 / 257,
    "kimi-k2": 9 / 385,
    "llama4-maverick": 2 / 129,
    "qwen3-235b-a22b": 8 / 128,
    "step3.5-flash": 9 / 289,
}

# Arithmetic intensity, core FLOPs per KV byte, 8-bit KV (Llama 4 and MiniMax in their mixed precisions, at 8K).
INTENSITY = {
    "deepseek-v3": 512,
    "kimi-k2": 256,
    "step3": 128,
    "qwen3-235b-a22b": 32,
    "qwen3-32b": 16,
    "ernie-4.5-300b": 16,
    "pangu-pro-moe": 10,
    "llama4-maverick": 8,
    "minimax-m1": 3.7,
}

# Table 8 and text, Step-3 on Hopper within 50 ms: topology, context, attention precision, batch, tokens/GPU/s.
# 2A2F and 4A2F are peak minutes, 16A2F is the report's extrapolation.
TABLE_8 = (
    ("2A2F", 4096, "fp8", 6144, 4039),
    ("3A2F", 4096, "bf16", 6048, 3321),
    ("4A2F", 8192, "fp8", 6144, 2643),
    ("16A2F", 32768, "fp8", 6144, 898),
)

# Of 2A2F, the long-term average beside its peak minute.
TGS_2A2F_AVERAGE = 3910

# DeepSeek-V3's published decode profile: 128 H800, 4096 context, 128 requests per GPU, tokens/GPU/s.
DEEPSEEK_PROFILE = (128, 4096, 128, 2324)

# Table 9, attention layer in microseconds on H800, H20, A800: 256 requests on 4 GPUs, 16-bit KV, 8-bit projections.
# MFA and MLA run data parallel (64 a GPU), GQA tensor parallel over the 4.
TABLE_9 = {
    ("step3", 8192): (281, 438, 531),
    ("deepseek-v3", 8192): (372, 1252, None),
    ("qwen3-235b-a22b", 8192): (382, 812, 791),
    ("step3", 32768): (791, 1452, 1484),
    ("deepseek-v3", 32768): (1125, 4817, None),
    ("qwen3-235b-a22b", 32768): (1391, 3042, 3010),
}

# Activated parameters that the report quotes, 1e9.
ACTIVATED = {
    "deepseek-v3": 37,
    "qwen3-235b-a22b": 22,
    "qwen3-32b": 32,
    "minimax-m1": 46,
    "ernie-4.5-300b": 47,
    "pangu-pro-moe": 16.5,
    "step3": 38,
}

# Communication budget of 2A2F, 128 tokens per GPU and micro-batch (StepMesh introduction): bytes per FFN GPU.
DISPATCH_BYTES, COMBINE_BYTES = 1.835e6, 3.670e6

# Rows a link carries in one of 3 stages of 50 ms over 61 layers, hidden 7168 (before protocol cost).
TCP_ROWS = {10: 16, 25: 40, 100: 160, 400: 640}

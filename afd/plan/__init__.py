"""The planner: what an xAyF topology costs and delivers, before anyone rents a GPU. No torch, no processes.

Read in this order: hardware, attention, models (facts) - cost, limits (the report's tables) - efficiency, stages,
pipeline, memory, estimate (one deployment) - search, mixed, colocated, tcp (the choice) - request_rate, prefill,
traffic (how many servers) - calibration - cli, figures.
"""

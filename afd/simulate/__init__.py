"""Discrete-event simulation of a whole cluster under load. No torch, no socket, no thread, no clock.

The decisions are the service's own code: the gateway's dispatcher, each attention worker's scheduler, admission,
latency model and stream choice, the FFN ranks' gang tables. Only time is modelled: stages take what a
`afd.plan.stages.StageModel` says.

cluster      wires it and runs it              settings, scenario   what is simulated, from flags
members      who is there, comes and goes      planned, rollout     what is lost or replaced when
gateway      the dispatcher and its clients    worker       an attention worker without tensors
layers       every layer of every step         closed_form  first and last layer, the inner ones by formula
arrivals     who asks when for how much        traces, prompts      recorded requests, and prefixes that they share
times        stage times, remembered           slowdowns, fabric, experts, loading    what changes them
results      what came out                     outcomes     of each request
"""

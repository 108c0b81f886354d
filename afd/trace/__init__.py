"""`afd trace`: the stages of all workers on one time axis, as a Perfetto trace and as a picture.

clocks, timeline, chrome, window, summary decide and convert (pure); collect talks to the workers; picture draws.
"""

"""The A:F ratio as a control loop: observe the cluster, decide on xAyF, recommend it or patch the scale target.

`observation` and `decision` are pure; `scale_target` calls the Kubernetes API; `controller` is the loop.
"""

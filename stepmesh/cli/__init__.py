"""The commands of `python -m stepmesh`."""

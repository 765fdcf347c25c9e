"""Training: configuration, recipes, the optimiser and its schedule, checkpoints, metrics and the loop.

Imports nothing, so that ``fastmae --help`` does not wait for PyTorch.
"""

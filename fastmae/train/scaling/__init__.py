"""Scaling on paper: what a run needs and how long it takes, from sizes and a description of the machines.

Pure functions; nothing here imports PyTorch. ``docs/scaling.md`` derives the formulas and names what is assumed.
"""

"""Triton device code of fastmae, and nothing else: every module here imports triton only.

Ships as ``fastmae.kernels``. The folder sits at the top of the tree because kernels are the first thing that many
readers look for; it must never become a top-level import, since the name belongs to another distribution on PyPI.
"""

if __name__ == "kernels":
    raise ImportError(
        "these are the kernels of fastmae: import them as fastmae.kernels (the top-level name 'kernels' belongs to "
        "another package on PyPI)"
    )

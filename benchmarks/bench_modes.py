"""A training step in the modes of torch.compile and in CUDA graphs, against the default. What does not win here, does
not become the default.

``fastmae``, ``fastmae-compile``  eager, and mode "default"
``fastmae-compile-*``             the other modes; "reduce-overhead" and "max-autotune" replay CUDA graphs of forward
                                  and backward, which copy masks and low-precision weights to where they read them
``fastmae-graph``, ``fastmae-compile-graph``  forward, backward and optimiser captured into one CUDA graph

fastmae's matrix products are inside ops that the compiler does not look into: max-autotune has little to choose.
"""

from __future__ import annotations

from bench_step import CUDA, build, chosen_models, model_id
from step_recipes import MODES


def pytest_generate_tests(metafunc):
    models = chosen_models(metafunc.config, ["base"] if CUDA else ["tiny-test"])
    metafunc.parametrize("model", models, ids=model_id)
    metafunc.parametrize("competitor", list(MODES))


def bench_modes(compete, device, model, competitor):
    compete(build, model, MODES, device, "modes of compilation")

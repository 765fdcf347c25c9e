"""How a global batch is divided among processes. Does not import PyTorch: flags are checked with it."""

from __future__ import annotations


def divide_batch(
    global_batch: int, world_size: int, max_batch: int | None = None, *, multiple_of: int = 1
) -> tuple[int, int]:
    """The batch of one process in one forward pass, and the passes whose gradients accumulate into a step.

    The policy for a changed number of nodes: the global batch stays what it is, and with it the learning rate, the
    schedule, and which samples make up a step; batch and accumulation follow. On half the processes each has twice as
    many samples, in one larger batch if that fits and else in twice as many passes.

    Args:
        global_batch: samples of an optimiser step.
        world_size: processes.
        max_batch: the most that fits on one device; None for whatever it takes to do without accumulation.
        multiple_of: what the batch must be a multiple of, as the masks an image are.

    Returns:
        ``(batch, accumulation)`` with ``batch * accumulation * world_size == global_batch``, batch as large as it may.

    Raises:
        ValueError: if the global batch does not divide among the processes, or no batch of at most ``max_batch`` is a
            multiple of ``multiple_of``.
    """
    if isinstance(max_batch, str):
        raise ValueError(f"max_batch: expected a number or None, got {max_batch!r}, which has to be settled first")
    for name, value in (("global_batch", global_batch), ("world_size", world_size), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    unit = world_size * multiple_of
    if global_batch % unit:
        below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
        near = f"{below} or {above}" if below else str(above)
        each = f" with {multiple_of} masks an image" if multiple_of > 1 else ""
        raise ValueError(
            f"global_batch: expected a multiple of {unit} for {world_size} processes{each}, such as {near}, "
            f"got {global_batch}"
        )
    if max_batch is not None and max_batch < multiple_of:
        raise ValueError(f"max_batch: expected at least {multiple_of}, got {max_batch}")
    share = global_batch // world_size
    most = share if max_batch is None else min(max_batch, share)
    batch = next(b for b in range(most, 0, -1) if share % b == 0 and b % multiple_of == 0)
    return batch, share // batch

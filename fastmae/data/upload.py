"""Host to device copies of batches, beside the training step and not in front of it."""

from __future__ import annotations

from typing import Any

import torch

from fastmae.data.batch import Batch


class Upload:
    """Copies one batch ahead to a GPU, on a stream of its own.

    Memory is allocated and freed on the consumer's stream and hence reused in its order, however far the host is ahead
    of the device. Three things keep that right: the copy waits for what the consumer's stream has queued so far (it may
    still use this memory), the consumer's stream waits for the copy's event, and it does so too for a batch that nobody
    takes. The host never waits.

    Tensors that are on the device already, such as the images that DALI decodes there, are not copied.

    Args:
        device: a CUDA device.
        cuda: ``torch.cuda``; tests pass a stand-in.

    Attributes:
        pending: whether a batch is on its way.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)
        self._batch: Batch | None = None
        self._copied: Any = None

    @property
    def pending(self) -> bool:
        return self._batch is not None

    def start(self, batch: Batch) -> None:
        """Begin to copy a batch, whose tensors are pinned or on the device; none may be pending."""
        copies = [t if t.device == self._device else torch.empty_like(t, device=self._device) for t in batch]
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            for copy, tensor in zip(copies, batch, strict=True):
                if copy is not tensor:
                    copy.copy_(tensor, non_blocking=True)
            self._copied = self._stream.record_event()
        self._batch = Batch(*copies)

    def finish(self) -> Batch:
        """The pending batch: what is queued on the current stream from now on finds it there."""
        batch, self._batch = self._batch, None
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(self._copied)
        for tensor in batch:
            # A no-op for memory of this stream. A decoder's images have memory of another one, which must not take it
            # back while this one still reads; so has a copy that was started while another stream was current.
            tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        """Drop the pending batch, if there is one."""
        if self.pending:
            self.finish()

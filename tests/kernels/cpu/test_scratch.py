"""The weight buffer: reused, safe when borrowed again, grown only when it must."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from gguf_sd_kernels import ops
from gguf_sd_kernels.cpu.scratch import borrow, release

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_buffer() -> None:
    release()


def address(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    with borrow(shape, dtype, CPU) as tensor:
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        return tensor.data_ptr()


def test_smaller_borrowers_share_the_largest_buffer() -> None:
    first = address((64, 33))
    assert address((64, 66), torch.bfloat16) == first
    assert address((3, 5)) == first


def test_nested_borrowers_do_not_share() -> None:
    with borrow((8, 8), torch.float32, CPU) as outer:
        outer.fill_(1)
        with borrow((8, 8), torch.float32, CPU) as inner:
            inner.fill_(2)
        release()  # nothing to release while it is lent
        assert (outer == 1).all()
        first = outer.data_ptr()
    assert address((8, 8)) == first


def test_an_error_inside_returns_the_buffer() -> None:
    first = address((8, 8))
    with pytest.raises(RuntimeError), borrow((8, 8), torch.float32, CPU):
        raise RuntimeError
    assert address((8, 8)) == first


def test_memory_that_is_not_there() -> None:
    """The sentence names the size, and the thread's buffer serves again; it holds no memory meanwhile."""
    address((8, 8))
    huge = 1 << 60
    with pytest.raises(MemoryError, match=f"no {huge / 1e6:.0f} MB of memory"), borrow((huge,), torch.uint8, CPU):
        pass
    first = address((16, 16))
    assert address((3, 5)) == first, "the buffer is kept again"


def test_threads_do_not_share() -> None:
    seen: list[int] = []
    with borrow((8, 8), torch.float32, CPU) as ours:
        thread = threading.Thread(target=lambda: seen.append(address((8, 8))))
        thread.start()
        thread.join()
        assert seen != [ours.data_ptr()]


def test_grown_in_inference_mode_usable_outside() -> None:
    with torch.inference_mode():
        address((16, 16))
    with borrow((16, 16), torch.float32, CPU) as tensor:
        tensor.fill_(1)


def test_gradients_survive_the_next_layer() -> None:
    """Autograd keeps a layer's weight until backward; another layer must not decode over it."""
    rng = np.random.default_rng(0)
    blocks = [torch.from_numpy(rng.integers(0, 60, (32, 34), dtype=np.uint8)) for _ in range(2)]
    weights = [ops.dequantize(b, "Q8_0") for b in blocks]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ops.linear(ops.linear(x, blocks[0], "Q8_0"), blocks[1], "Q8_0").sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (torch.ones(3, 32) @ weights[1]) @ weights[0])

"""Workers that measure what the machine can do: the rate of a large matrix product, and of a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.protocol import Channel

SIZES = {"cpu": (2048, 1 << 28), "gpu": (8192, 1 << 31)}  # matrix width; bytes copied


def best(run: Callable[[], Any], repeats: int) -> float:
    """The shortest of `repeats` times of `run`, after one that does not count. `run` waits for its result."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(product: Callable[[], Any], copy: Callable[[], Any], width: int, size: int) -> dict[str, float]:
    """`flops` (2 n^3 a product) and `bandwidth` (bytes read and written a second)."""
    return {"flops": 2 * width**3 / best(product, 5), "bandwidth": 2 * size / best(copy, 5)}


def serve(channel: Channel, found: Mapping[str, float]) -> None:
    """Answers the setup with the rates and waits for the end."""
    channel.reply(**found)
    channel.receive()


def run(job: Mapping[str, Any], channel: Channel) -> None:
    """The rates of the framework `job["framework"]` in `job["precision"]`."""
    serve(channel, FRAMEWORKS[job["framework"]](job))


def torch_rates(job: Mapping[str, Any]) -> dict[str, float]:
    """Through torch."""
    import torch

    from benchmarks.torch_common import DTYPES, device, synchronize, threads

    threads()
    width, size = SIZES[job["device"]]
    where = {"device": device(job)}
    a = torch.randn(width, width, **where).to(DTYPES[job["precision"]])
    source = torch.randn(size // 4, **where)
    target = torch.empty_like(source)

    def waited(run: Callable[[], Any]) -> Callable[[], None]:
        def go() -> None:
            run()
            synchronize(job)

        return go

    return rates(waited(lambda: a @ a), waited(lambda: target.copy_(source)), width, size)


def jax_rates(job: Mapping[str, Any]) -> dict[str, float]:
    """Through jax; a bfloat16 product with a float32 result, as the models use it."""
    import jax
    import jax.numpy as jnp

    width, size = SIZES[job["device"]]
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[job["precision"]]
    a = jax.random.normal(jax.random.key(0), (width, width)).astype(dtype)
    x = jax.random.normal(jax.random.key(1), (size // 4,))
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    copy = jax.jit(lambda x: x + 1.0)
    return rates(lambda: product(a).block_until_ready(), lambda: copy(x).block_until_ready(), width, size)


FRAMEWORKS = {"torch": torch_rates, "jax": jax_rates}

"""Memory of a DPO step, by the compiler's account: log-probs in chunks against arrays [B, T, V] at once.

    python -m benchmarks.memory --out benchmarks/results/memory-dpo.json

Nothing runs: the temporary bytes of the compiled programs are what another process cannot disturb.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tables
from jaxalign.data.rows import arrange
from jaxalign.models.base import resolve_dtype
from jaxalign.models.source import resolve
from jaxalign.sharding import make_mesh
from jaxalign.train import feed
from jaxalign.train.assemble import Machine, load_weights
from jaxalign.train.score import hidden_states
from jaxalign.train.settings import config_for, objective_for
from jaxalign.types import Batch, Example, Group, Params

COLUMNS = ["pairs", "tokens a row", "of them prompt", "step", "temporary MiB", "over ours"]
BETA = 0.1


def pairs(count: int, length: int, share: bool) -> Batch:
    """A batch [1, count, 2, length] of random answers to random prompts of half that length."""
    rng, prompt = np.random.default_rng(0), length // 2

    def member(stem: np.ndarray) -> Example:
        tokens = np.concatenate([stem, rng.integers(0, 1000, length - prompt)]).astype(np.int32)
        return Example("", tokens, np.arange(length) >= prompt)

    stems = [rng.integers(0, 1000, prompt) for _ in range(count)]
    items = [Group(str(i), (member(stem), member(stem))) for i, stem in enumerate(stems)]
    rows = arrange(items, max_length=length, group=2, share=share)
    return rows.batch(np.arange(count)[None])


def chunked(machine: Machine, batch: Batch) -> int:
    """Temporary bytes of the training step as it is."""
    programs = machine.train_programs([feed.abstract(batch, machine.mesh)])
    return programs.temporary


def dense(machine: Machine, batch: Batch) -> int:
    """Temporary bytes of loss and gradient with the log-softmax of all positions at once, policy and
    reference; the model's own rematerialisation as in the step."""
    model = replace(machine.weights.model, remat=machine.config.remat)

    def log_probs(adapter: Params | None, base: Params, part: Batch) -> jax.Array:
        hidden = hidden_states(model, adapter, base, part)[:, :-1]
        logits = jnp.einsum("btd,vd->btv", hidden, model.unembed(base), preferred_element_type=jnp.float32)
        tokens, mask = (x.reshape(-1, x.shape[-1])[:, 1:] for x in (part.tokens, part.mask))
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return jnp.where(mask, found, 0.0).sum(axis=-1).reshape(-1, 2)

    def loss(adapter: Params, base: Params, part: Batch) -> jax.Array:
        ratio = log_probs(adapter, base, part) - jax.lax.stop_gradient(log_probs(None, base, part))
        return -jax.nn.log_sigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()

    one = jax.tree.map(lambda x: x[0], batch)
    weights = machine.weights
    program = jax.jit(jax.value_and_grad(loss)).lower(weights.params, weights.base, one).compile()
    return program.memory_analysis().temp_size_in_bytes


def measure(count: int, length: int, machine: Machine) -> list[dict[str, Any]]:
    """The rows of one size."""
    once, twice = pairs(count, length, share=True), pairs(count, length, share=False)
    found = {
        "ours": chunked(machine, once),
        "ours, prompts twice": chunked(machine, twice),
        "dense": dense(machine, twice),
    }
    size = {"pairs": count, "tokens a row": length, "of them prompt": length // 2}
    return [
        {**size, "step": name, "temporary MiB": n / 2**20, "over ours": n / found["ours"]}
        for name, n in found.items()
    ]


def main() -> None:
    """Compiles every size and prints the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m-instruct", help="built-in name or HF folder")
    p.add_argument("--pairs", type=int, default=4)
    p.add_argument("--length", type=int, nargs="+", default=[256, 512, 1024], help="tokens of a row")
    p.add_argument("--remat", default="dots", choices=("none", "dots", "full"))
    p.add_argument("--out", type=Path, help="result file (.json); the table goes beside it as .md")
    o = p.parse_args()
    mesh, source = make_mesh(), resolve(o.model)
    longest = {"max_length": max(o.length), "batch_size": o.pairs, "remat": o.remat}
    config = config_for("dpo")(dtype=resolve_dtype("auto"), learning_rate=1e-5, beta=BETA, **longest)
    machine = Machine(
        load_weights(source, mesh, config), objective_for("dpo", config), mesh, config, 10, print
    )
    rows = [row for length in o.length for row in measure(o.pairs, length, machine)]
    about = {"model": o.model, "dtype": config.dtype, "remat": o.remat, "jax": jax.__version__}
    table = tables.markdown(COLUMNS, rows)
    print(table)
    if o.out:
        o.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
        o.out.with_suffix(".md").write_text(f"# {__doc__.splitlines()[0]}\n\n{facts}\n\n{table}\n")


if __name__ == "__main__":
    main()

"""An engine from a model's name."""

from __future__ import annotations

import jax

from jaxalign import distributed
from jaxalign.data.chat import Tokenizer, load_tokenizer
from jaxalign.models.base import DTYPES, resolve_dtype
from jaxalign.models.load import load_model
from jaxalign.models.source import resolve
from jaxalign.sampling.engine import Engine
from jaxalign.sampling.settings import GenerateConfig
from jaxalign.sharding import make_mesh


def load_engine(model: str, config: GenerateConfig) -> tuple[Engine, Tokenizer, str]:
    """The engine and tokenizer of anything that `-m` takes, and a hash of what it is.

    An adapter is folded into the weights. Raises `UserError` as `resolve` and `load_model` do.
    """
    distributed.use_compile_cache()
    source = resolve(model)
    tokenizer = load_tokenizer(source)
    dtype = DTYPES[resolve_dtype(config.dtype)]
    mesh = make_mesh(config.mesh)
    loaded = load_model(source, mesh, param_dtype=dtype, compute_dtype=dtype)
    base = jax.jit(loaded.model.deploy, donate_argnums=1)(loaded.adapter, loaded.base)
    engine = Engine(
        loaded.model.deployed,
        base,
        decode=tokenizer.decode,
        stop_tokens=tuple(dict.fromkeys((*loaded.stop_tokens, *tokenizer.stop_tokens))),
        slots=config.batch_size,
        shards=mesh.shape["data"] * mesh.shape["fsdp"],
    )
    return engine, tokenizer, loaded.base_hash

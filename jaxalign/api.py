"""One call for each thing that the command line does, with the same keys; `jaxalign.train` and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from jaxalign.config import Config, load_config
from jaxalign.errors import UserError, nearest
from jaxalign.registry import METHODS, ONLINE
from jaxalign.yaml_layers import inline, read_file

if TYPE_CHECKING:
    from jaxalign.plan import Plan
    from jaxalign.sampling.generate import GenerateReport
    from jaxalign.sampling.settings import GenerateConfig
    from jaxalign.serve.settings import ServeConfig
    from jaxalign.train.run import RunResult

# What a run is about, beside the keys of its method. They stand in YAML like any other key.
_ABOUT: dict[str, tuple[Any, str]] = {
    "method": (str, "training method; on the command line the first word after `train`"),
    "model": (str, "where to start: a built-in name, hub id, folder, .gguf or an earlier run (-m)"),
    "data": (str | tuple[str, ...], "rows to learn: files, folders or hub data sets (-d)"),
    "out": (Path, "folder of the run (-o)"),
}


@dataclass(frozen=True)
class Run:
    """A training run as it was asked for. `config` is of the method's class; `data` and `out` may be None."""

    method: str
    model: str
    data: str | tuple[str, ...] | None
    out: Path | None
    config: Any


@cache
def run_settings(method: str, needs: tuple[str, ...] = ("model", "data", "out")) -> type[Config]:
    """A method's settings with `method`, `model`, `data` and `out`; those in `needs` must be given."""
    fields: dict[str, Any] = {
        name: (kind, Field(description=text))
        if name in needs
        else (kind | None, Field(None, description=text))
        for name, (kind, text) in _ABOUT.items()
    }
    return create_model(f"{method}_run", __base__=method_settings(method), **fields)


def method_settings(method: str) -> type[Config]:
    """The keys of a training method. Raises `UserError` on an unknown one."""
    from jaxalign.train.settings import config_for

    METHODS.check(method)
    return ONLINE[method].config if method in ONLINE else config_for(method)


def read_run(
    method: str | None = None,
    files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    needs: tuple[str, ...] = ("model", "data", "out"),
) -> Run:
    """A run from YAML files, overrides and Python values. Raises `UserError` with every mistake at once."""
    method = method or _method_in(files)
    cls = run_settings(method, needs)
    found = load_config(cls, files, overrides, {"method": method, **(values or {})})
    own = {k: v for k, v in found.model_dump(exclude_unset=True).items() if k not in _ABOUT}
    about = {name: getattr(found, name) for name in _ABOUT}
    return Run(**about, config=method_settings(method).model_validate(own))


def _method_in(files: Sequence[str | Path]) -> str:
    """The `method:` that a YAML file names."""
    for path in reversed(files):
        name = read_file(Path(path)).values.get("method")
        if name:
            return str(name)
    raise UserError("no training method", remedy=f"name one of: {', '.join(METHODS)}")


# ------------------------------------------------------------------------------------------- training


def train(
    method: str,
    model: str | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    *,
    config: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    **keys: Any,
) -> RunResult:
    """Fine-tunes `model` on `data` into the folder `out`; the same call goes on where it stopped.

    `keys` are the method's settings (`learning_rate=1e-4`, `lora={"rank": 8}`, `lora=None`), laid over YAML
    files in `config` and `a.b=c` strings in `overrides`. Returns a `jaxalign.train.run.RunResult`. Raises
    `UserError`.
    """
    return start(read_run(method, config, overrides, _given(model=model, data=data, out=out) | keys))


def start(run: Run) -> Any:
    """Trains. A run that a signal stopped ends in a `UserError` of status 75."""
    from jaxalign.train.run import train as work

    assert run.data is not None, "a run that is only planned"
    assert run.out is not None, "a run that is only planned"
    if run.method in ONLINE:
        return ONLINE[run.method].run(run.model, run.data, run.out, run.config)
    return work(run.method, run.model, run.data, run.out, run.config)


def plan(
    method: str,
    model: str | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    on: str | None = None,
    mfu: float = 0.4,
    config: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    **keys: Any,
) -> Plan:
    """Memory, FLOPs and time of such a training run, by arithmetic.

    `on` names devices (`h100:8`), else this machine's are meant. Reads no weights.
    """
    run = read_run(method, config, overrides, _given(model=model, data=data) | keys, needs=("model",))
    return plan_of(run, on=on, mfu=mfu)


def plan_of(run: Run, on: str | None = None, mfu: float = 0.4) -> Plan:
    """The plan of a run; of a method in rounds, that of its training steps."""
    from jaxalign.preflight import plan_online, plan_run
    from jaxalign.train.settings import config_for

    if run.method not in ONLINE:
        return plan_run(run.method, run.model, run.data, run.config, on=on, mfu=mfu)
    method = ONLINE[run.method]
    if method.loss is not None:
        return plan_online(method.loss, run.model, run.config, on=on, mfu=mfu)
    kind = config_for(method.objective)
    given = run.config.model_dump(exclude_unset=True)
    config = kind.model_validate({k: v for k, v in given.items() if k in kind.model_fields})
    return plan_run(method.objective, run.model, None, config, on=on, mfu=mfu)


# ------------------------------------------------------------------------------------------- sampling


def generate_settings() -> type[GenerateConfig]:
    """The keys of `generate` and `chat`."""
    from jaxalign.sampling.settings import GenerateConfig as Settings

    return Settings


def generate(
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    config: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    **keys: Any,
) -> GenerateReport:
    """Answers every row of `data` into the JSONL file `out`; rows that it holds already are skipped."""
    from jaxalign.sampling.generate import generate as work

    return work(model, data, Path(out), load_config(generate_settings(), config, overrides, keys))


def chat(
    model: str, *, config: Sequence[str | Path] = (), overrides: Sequence[str] = (), **keys: Any
) -> None:
    """A conversation in the terminal."""
    from jaxalign.sampling.chat import chat as work

    work(model, load_config(generate_settings(), config, overrides, keys))


def serve_settings() -> type[ServeConfig]:
    """The keys of `serve`."""
    from jaxalign.serve.settings import ServeConfig as Settings

    return Settings


def serve(
    model: str, *, config: Sequence[str | Path] = (), overrides: Sequence[str] = (), **keys: Any
) -> None:
    """An OpenAI-compatible server of `model`, until SIGTERM or Ctrl-C. Raises `UserError`."""
    from jaxalign.serve.run import serve as work

    work(model, load_config(serve_settings(), config, overrides, keys))


# ------------------------------------------------------------------------------------------- building


def build(
    method: str,
    model: Any = None,
    data: str | Path | Sequence[str | Path] | None = None,
    out: str | Path = "records.jsonl",
    *,
    models: Mapping[str, Any] | None = None,
    config: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    **keys: Any,
) -> dict[str, Any]:
    """Builds records from `data` into the file `out` by the builder of that registry name; the report.

    `model` and `models`, by the builder's other roles, are what `-m` takes, endpoints
    (`http(s)://host/v1#model`) or objects that answer (`jaxalign.llm.base.LLM`). Raises `UserError`.
    """
    from jaxalign.registry import BUILDERS
    from jaxalign.synth.build import build as work

    settings = load_config(BUILDERS[method].config, config, overrides, keys)
    given = ({} if model is None else {"model": model}) | dict(models or {})
    return work(method, given, data, Path(out), settings)


# ----------------------------------------------------------------------------------------- evaluation


def evaluate(
    method: str,
    model: str,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    config: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    **keys: Any,
) -> dict[str, Any]:
    """Judges `model` on `data` into the folder `out`, by the evaluation of that registry name; the report."""
    from jaxalign.registry import EVALUATIONS

    kind = EVALUATIONS[method]
    return kind.run(model, data, Path(out), load_config(kind.config, config, overrides, keys))


# ----------------------------------------------------------------------------------------- everything else


def export(model: str, out: str | Path, format: str = "peft", dtype: str = "f32") -> Path:
    """Writes `model` for other programs and returns the folder: `peft` its adapter, `hf` the merged model.

    `dtype`, `f32` or `bf16`, is that of a merged model's weights; adapters are float32.
    """
    import jax.numpy as jnp

    from jaxalign.data.chat import load_tokenizer
    from jaxalign.models.load import load_model
    from jaxalign.models.source import resolve
    from jaxalign.sharding import make_mesh

    if format not in _FORMATS:
        raise UserError(f"unknown format {format!r}{nearest(format, _FORMATS)}", remedy="known: peft, hf")
    if dtype not in ("f32", "bf16"):
        raise UserError(f"unknown dtype {dtype!r}", remedy="known: f32, bf16")
    source = resolve(model)
    if format == "peft" and source.adapter is None:
        raise UserError(f"{model} has no adapter", place="--format peft", remedy="use --format hf")
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, make_mesh(), param_dtype=jnp.float32)
    return _FORMATS[format](loaded, Path(out), tokenizer, jnp.bfloat16 if dtype == "bf16" else jnp.float32)


def _export_peft(loaded: Any, out: Path, tokenizer: Any, dtype: Any) -> Path:
    from jaxalign.models.export import export_peft

    return export_peft(
        loaded.model,
        loaded.adapter,
        loaded.source,
        out,
        stop_tokens=tokenizer.stop_tokens,
        base_hash=loaded.base_hash,
        tokenizer=tokenizer.hf,
        head=loaded.head,
    )


def _export_hf(loaded: Any, out: Path, tokenizer: Any, dtype: Any) -> Path:
    from jaxalign.models.export import export_hf

    base = loaded.model.merge(loaded.adapter, loaded.base)
    return export_hf(
        replace(loaded.model, adapter=None),
        base,
        loaded.source,
        out,
        stop_tokens=tokenizer.stop_tokens,
        tokenizer=tokenizer.hf,
        dtype=dtype,
        head=loaded.head,
    )


_FORMATS = {"peft": _export_peft, "hf": _export_hf}


def pull(model: str) -> Path:
    """Downloads a model unless it is here, and returns where it lies."""
    from jaxalign.models.source import resolve

    source = resolve(model)
    return source.gguf or source.folder


def inspect_data(
    model: str, data: str | Path, rows: int = 3, overrides: Sequence[str] = (), **keys: Any
) -> None:
    """Prints the rows as training sees them: tokens, what is learned, what is left out and why.

    `keys` are those of a training method that say how rows are read, and `kind`.
    """
    from jaxalign.data.chat import load_tokenizer
    from jaxalign.data.inspect import inspect_files
    from jaxalign.models.source import resolve
    from jaxalign.train.settings import InspectConfig

    config = load_config(InspectConfig, (), overrides, keys)
    inspect_files(
        data,
        load_tokenizer(resolve(model)),
        kind=config.kind,
        options=config.options,
        max_bad_rows=config.max_bad_rows,
        max_length=config.max_length,
        truncation=config.truncation,
        loss_on=config.loss_on,
        rows=rows,
    )


def inspect_model(model: str) -> dict[str, str | int | bool]:
    """What a model is made of: family and shape, parameters, files, adapter, template and stop tokens."""
    from jaxalign.data.chat import load_tokenizer
    from jaxalign.models.decoder import Model, parameter_count
    from jaxalign.models.hashing import content_hash
    from jaxalign.models.load import open_checkpoint
    from jaxalign.models.peft import open_adapter
    from jaxalign.models.source import resolve

    source = resolve(model)
    checkpoint = open_checkpoint(source)
    decoder, tokenizer = checkpoint.decoder(), load_tokenizer(source)
    base_hash = content_hash(checkpoint.files)
    adapter = open_adapter(source.adapter, checkpoint.family.names(decoder), base_hash)
    made = Model(decoder, adapter.config if adapter else None)
    extra, base = (parameter_count(tree) for tree in made.shapes())
    stops = [f"{tokenizer.decode([i], special=True)} ({i})" for i in tokenizer.stop_tokens]
    return {
        "model": model,
        "base": source.name,
        "family": decoder.model_type,
        "parameters": base,
        "adapter parameters": extra,
        "adapter": inline(adapter.config.model_dump()) if adapter else "none",
        "layers": decoder.num_layers,
        "hidden size": decoder.hidden_size,
        "heads": f"{decoder.num_heads} of {decoder.head_dim}, {decoder.num_kv_heads} key-value",
        "vocabulary": decoder.vocab_size,
        "positions": decoder.max_positions,
        "windows": ", ".join(sorted({str(window) for _, window in decoder.kinds if window})) or "none",
        "tied embeddings": decoder.tied,
        "files": "\n".join(map(str, checkpoint.files)),
        "sha256": base_hash,
        "stop tokens": ", ".join(stops),
        "chat template": tokenizer.fault or "usable",
    }


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None, paths as text."""
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_plain(part) for part in value)
    return str(value) if isinstance(value, Path) else value

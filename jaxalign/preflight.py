"""From a training run as it was asked for to the numbers that `plan` works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxalign import distributed
from jaxalign.errors import UserError
from jaxalign.models.base import resolve_dtype
from jaxalign.models.decoder import Adapter, Model
from jaxalign.models.load import open_checkpoint
from jaxalign.models.peft import open_adapter
from jaxalign.models.source import resolve
from jaxalign.models.store import read_json
from jaxalign.plan import Job, Machine, Plan, Rollout, machine_named, make_plan
from jaxalign.registry import FAMILIES
from jaxalign.sharding import mesh_sizes
from jaxalign.train.assemble import HEADROOM, check_foldable, remat_policies
from jaxalign.train.inputs import default_batch_size, read_inputs, total_steps
from jaxalign.train.optim import make_optimizer, make_schedule
from jaxalign.train.reference import resolve_mode
from jaxalign.train.settings import TrainConfig, objective_for
from jaxalign.train.stages import renewed

BYTES = {"bf16": 2, "f32": 4}
MEMBERS = 4  # answers of a list, where there is no data to count them in


def plan_run(
    method: str, model: str, data: Any, config: TrainConfig, on: str | None = None, mfu: float = 0.4
) -> Plan:
    """The plan of training `model` on `data` (None: rows of max_length), on the devices that `on` names.

    Without `on` the devices of this machine are meant, and started. Raises `UserError`.
    """
    config, job, objective = _job(partial(objective_for, method), model, config, on, mfu)
    return make_plan(_with_remat(_with_data(job, model, data, config, objective), config.remat))


def plan_online(loss: Any, model: str, config: Any, on: str | None = None, mfu: float = 0.4) -> Plan:
    """The plan of a method that samples while it learns: its updates at full length, and its rollouts. `loss`
    is the class of its objective. Raises `UserError`."""
    make = lambda config: loss(**{name: getattr(config, name) for name in loss.model_fields})  # noqa: E731
    config, job, objective = _job(make, model, config, on, mfu)
    answers = (config.batch_size or 1) * config.minibatches * config.n
    beside = getattr(config, "ptx_data", None) is not None
    alone = objective.group - beside == 1
    critic = objective.kind == "actor_critic"
    passes = 1 + ("ref" in objective.needs) + critic
    job = replace(
        job,
        rows=job.rows * (config.n if alone else 1),
        members=1 + beside if alone else (objective.group or config.n),
        trunks=1 + critic,
        rollout=Rollout(answers, config.max_tokens, config.rollout_batch_size, passes),
    )
    return make_plan(_with_remat(job, config.remat))


def _job(
    objective_of: Callable[[Any], Any], model: str, config: Any, on: str | None, mfu: float
) -> tuple[Any, Job, Any]:
    """(the configuration with what is left to the machine and the model, the job without its data, the
    objective)."""
    machine = machine_named(on) if on else this_machine()
    mesh = mesh_sizes(config.mesh, machine.count)
    dtype = config.dtype if config.dtype != "auto" else "bf16" if on else resolve_dtype("auto")
    shards = mesh["data"] * mesh["fsdp"]
    rows = config.batch_size or default_batch_size(shards, config.grad_accumulation)
    config = config.model_copy(update={"batch_size": rows, "dtype": dtype})
    raw, adapter, imported = read_config(model, config)
    config = config.with_adapter(adapter)
    objective = objective_of(config)
    job = Job(
        Model(FAMILIES[raw.get("model_type", "")].from_hf(raw), adapter),
        mesh,
        machine,
        rows=max(1, rows // config.grad_accumulation),
        length=config.max_length,
        accumulation=config.grad_accumulation,
        compute_bytes=BYTES[dtype],
        steps=config.max_steps,
        mfu=mfu,
        members=objective.group or MEMBERS,
        quantise=config.quantise,
        reference=_reference(objective, config, imported),
    )
    return config, replace(job, optimizer=optimizer_share(job.model, config)), objective


def _reference(objective: Any, config: Any, imported: bool) -> str | None:
    if "ref" not in objective.needs:
        return None
    adapter: Adapter | None = config.adapter
    kind = {"full": adapter is None, "imported": imported, "mixes": adapter is not None and adapter.mixes}
    return resolve_mode(config.reference, renewed=renewed(config), **kind)


def this_machine() -> Machine:
    """The devices that JAX finds here. Processors share the machine's memory."""
    first, count = jax.devices()[0], jax.device_count()
    limit = (first.memory_stats() or {}).get("bytes_limit")
    if limit is None and first.platform == "cpu":
        limit = distributed.host_memory() / jax.local_device_count()
    return Machine(first.device_kind, limit, count)


def read_config(model: str, config: TrainConfig) -> tuple[dict[str, Any], Adapter | None, bool]:
    """The model's config.json as a dict, the adapter that the run trains, and whether the model brings it.

    Takes what `-m` takes, and a config.json or a folder with nothing else; of a hub model only that file is
    fetched. Raises `UserError`.
    """
    path, asked = Path(model).expanduser(), (config.adapter, False)
    if path.suffix == ".json" or (path / "config.json").exists():
        return _text(read_json(path if path.suffix == ".json" else path / "config.json")), *asked
    if not path.exists() and model.count("/") == 1:
        return _text(read_json(_hub_config(model))), *asked
    source = resolve(model)
    checkpoint = open_checkpoint(source)
    names = checkpoint.family.names(checkpoint.decoder())
    imported = open_adapter(source.adapter, names)
    if imported is None:
        return checkpoint.config, *asked
    if not config.names_adapter:
        return checkpoint.config, imported.config, True
    if config.adapter is None:
        check_foldable(imported.config)
    else:
        imported.check_against(config.adapter)
    return checkpoint.config, config.adapter, True


def _hub_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    name, _, revision = model.partition("@")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision or None))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "check the name and the network, or give a folder with config.json"
        raise UserError(f"no config.json of {model!r}: {reason}", remedy=remedy) from error


def _text(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model of a multimodal configuration."""
    inner = raw.get("text_config")
    return inner if raw.get("model_type") not in FAMILIES.entries and isinstance(inner, dict) else raw


def optimizer_share(model: Model, config: TrainConfig) -> float:
    """Bytes of optimiser state per byte of trained parameters, from the optimiser itself."""
    adapter, base = model.shapes()
    trained = adapter or base
    optimizer = make_optimizer(config, make_schedule(config, 1.0, 1))
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    return size(jax.eval_shape(optimizer.init, trained)) / size(trained)


def _with_data(job: Job, model: str, data: Any, config: TrainConfig, objective: Any) -> Job:
    """The job with the rows counted: how long they really are, how many steps they make."""
    if data is None:
        return job
    from jaxalign.data.chat import load_tokenizer

    inputs = read_inputs(data, load_tokenizer(resolve(model)), config, objective, lambda line: None)
    source = inputs.source
    return replace(
        job,
        members=source.members,
        length=max(source.lengths),
        examples=source.stats.examples,
        tokens=source.stats.tokens,
        steps_per_epoch=source.steps_per_epoch,
        steps=total_steps(config, source),
    )


def _with_remat(job: Job, asked: str) -> Job:
    """The job with the policy that the run would take: `auto` keeps as much as the device holds."""
    policies = remat_policies(asked, "cpu" if job.machine.is_cpu else "accelerator")
    jobs = [replace(job, model=replace(job.model, remat=policy)) for policy in policies]
    memory = job.machine.memory
    if memory is None or job.machine.is_cpu:  # nothing tells the run where the limit is
        return jobs[0]
    fits = [j for j in jobs if make_plan(j).value("memory of a device", "total") <= HEADROOM * memory]
    return fits[0] if fits else jobs[-1]

"""Joining the other processes of a run, the compilation cache, and the notice to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError

PREEMPTED = 75  # EX_TEMPFAIL: job managers start the same command again on a non-zero exit

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Notice:
    """A switch that the first SIGTERM throws. A second SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.raised = False
        self._before: Any = signal.SIG_DFL

    def watch(self) -> None:
        """Starts listening. Only the main thread may: elsewhere this does nothing."""
        if threading.current_thread() is threading.main_thread():
            self.raised, self._before = False, signal.signal(signal.SIGTERM, self._received)

    def ignore(self) -> None:
        """Gives the signal back to whoever had it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _received(self, number: int, frame: Any) -> None:
        self.raised = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


def launcher(env: Mapping[str, str]) -> str:
    """Who started this process, from its environment: one of `explicit pathways slurm mpi tpu k8s single`."""
    if env.get("JAX_PLATFORMS") == "proxy":
        return "pathways"
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env:
        return "explicit"
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "mpi"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "tpu"
    if _is_tpu_vm(env):
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and _installed("kubernetes"):
        return "k8s"
    return "single"


def _is_tpu_vm(env: Mapping[str, str]) -> bool:
    """A Cloud TPU host whose metadata server may be asked for its neighbours."""
    wanted = env.get("JAX_PLATFORMS", "tpu").startswith("tpu") and "TPU_SKIP_MDS_QUERY" not in env
    return wanted and "TPU_ACCELERATOR_TYPE" in env and _installed("libtpu")


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def start(env: Mapping[str, str] | None = None) -> None:
    """Joins the other processes of the run, if there are any. Call it before JAX touches a device.

    Explicit `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` win (JAX itself reads only
    the first); then what JAX detects (Slurm, Open MPI, Cloud TPU, Kubernetes); else the process is alone.
    Calling it again is harmless. Raises `UserError` when the environment is incomplete or the others stay
    away.
    """
    env = os.environ if env is None else env
    who = launcher(env)
    if who == "single" or _joined():
        return
    arguments = _explicit(env) if who == "explicit" else {}
    if who == "slurm":
        _check_slurm(env)
    try:
        _start_pathways() if who == "pathways" else _initialise(arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"this process could not join its run (started by: {who}): {_first_line(error)}",
            place="environment",
            remedy="start the same command on every host; check that the coordinator's port is reachable and "
            "that no HTTP_PROXY is set",
        ) from error


def _joined() -> bool:
    import jax

    return jax.distributed.is_initialized()


def _initialise(arguments: dict[str, Any]) -> None:
    import jax

    jax.distributed.initialize(**arguments)


def _start_pathways() -> None:
    import importlib

    importlib.import_module("pathwaysutils").initialize()


def _explicit(env: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in _EXPLICIT if name not in env]
    if missing:
        raise UserError(
            f"{missing[0]} is not set, but {_EXPLICIT[0]} is",
            place="environment",
            remedy=f"set all of {', '.join(_EXPLICIT)}, or none of them",
        )
    try:
        count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
    except ValueError as error:
        raise UserError(
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers: {error}", place="environment"
        ) from error
    return {
        "coordinator_address": env["JAX_COORDINATOR_ADDRESS"],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _check_slurm(env: Mapping[str, str]) -> None:
    """Under Slurm JAX gives each task one GPU: one task on an 8-GPU node would silently use one of them."""
    tasks = env.get("SLURM_NTASKS_PER_NODE", "").split("(")[0]
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if tasks.isdigit() and gpus.isdigit() and int(tasks) < int(gpus) and "JAX_LOCAL_DEVICE_IDS" not in env:
        raise UserError(
            f"{tasks} task(s) on a node with {gpus} GPUs: each task uses one GPU, the rest would stay idle",
            place="SLURM_NTASKS_PER_NODE",
            remedy=f"use --ntasks-per-node={gpus}, or set JAX_LOCAL_DEVICE_IDS",
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def process_index() -> int:
    """This process's number, 0 to `process_count() - 1`."""
    import jax

    return jax.process_index()


def process_count() -> int:
    """How many processes share the run."""
    import jax

    return jax.process_count()


def is_first() -> bool:
    """True on the one process that prints and writes the run folder's files."""
    return process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process has called it with the same `name`."""
    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def preempted(step: int, notice: Notice) -> bool:
    """True when the run should save after `step` and stop, on every process after the same step.

    Alone, a process asks its own `notice`. Among others it asks JAX's coordination service, which caught the
    signal of any of them; every process must call this once per step.
    """
    if process_count() == 1:
        return notice.raised
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def cache_folder(env: Mapping[str, str] | None = None) -> Path:
    """Where compiled programs are kept: `$JAXALIGN_CACHE/jax`, else `~/.cache/jaxalign/jax`."""
    env = os.environ if env is None else env
    root = env.get("JAXALIGN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "jaxalign") / "jax"


def use_compile_cache(folder: Path | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that the next start of the same run compiles nothing.

    `JAX_COMPILATION_CACHE_DIR` wins over `folder`; a folder that cannot be made leaves the cache off (None).
    The entries are executed: the folder must not be writable by others.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    folder = folder or cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs count too: a fine-tuning run starts with a hundred of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


_ACCELERATORS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt(3)


def share_arena() -> bool:
    """Makes all threads allocate from one arena; whether it could. To be called before JAX starts any:
    `keep_freed_memory` cannot keep what they free in arenas of their own."""
    return _mallopt({_ARENA_MAX: 1})


def keep_freed_memory(temporary: float = 0.0) -> bool:
    """Keeps what XLA's CPU backend frees from now on; whether it could (glibc on Linux, no accelerator).

    Every step allocates the same gigabyte of temporary memory, which glibc by default takes from the kernel
    and gives back each time: 15 % of a LoRA step of a 135M model was spent in page faults. To be called once
    weights are loaded and programs compiled, whose garbage would be kept as well.

    `temporary`: bytes that the programs of the run take for a step, all added up. Kept memory gets holes,
    and programs of several sizes fill it up (four that took 10 GB together: to 19 GB). Where it would be
    more than an eighth of the machine's memory, everything stays as it is.
    """
    if temporary > host_memory() / 8:
        return False
    return _mallopt({_TRIM_THRESHOLD: -1, _MMAP_MAX: 0})


def host_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _mallopt(options: Mapping[int, int]) -> bool:
    cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(_installed, _ACCELERATORS))
    if not sys.platform.startswith("linux") or not cpu:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())

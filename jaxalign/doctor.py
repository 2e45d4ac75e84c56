"""What this machine offers and what is wrong with it, for a person and for a bug ticket.

Nothing here starts a device in this process: a driver that hangs or a flag that aborts is met in a child.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxalign.distributed import cache_folder, launcher

PACKAGES = tuple(
    "jax jaxlib flax optax orbax-checkpoint numpy scipy transformers tokenizers datasets pyarrow gguf "  # noqa: SIM905
    "pydantic PyYAML typer rich Jinja2 tensorboardX".split()
)

_DEVICES = """
import json, jax
d = jax.devices()
memory = []
for x in jax.local_devices():
    try: memory.append((x.memory_stats() or {}).get("bytes_limit"))
    except Exception: memory.append(None)
print("REPORT" + json.dumps({"platform": d[0].platform, "kind": d[0].device_kind, "count": len(d),
      "local": jax.local_device_count(), "processes": jax.process_count(), "memory": memory}))
"""

_CACHE = """
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
"""


@dataclass(frozen=True)
class Check:
    """One finding. `advice` says what to do where `status` is not "ok"."""

    area: str
    name: str
    value: str
    status: Literal["ok", "warn", "fail"] = "ok"
    advice: str = ""


def examine(env: Mapping[str, str] | None = None) -> list[Check]:
    """Every check, in the order in which they are shown."""
    env = dict(os.environ if env is None else env)
    flags = check_flags(env)
    # A flag that aborts jax fails everything after it too: one finding is enough.
    started = [*check_devices(env), *check_cache(env)] if healthy(flags) else []
    return [
        *check_python(sys.version_info[:2]),
        *check_versions(installed_versions()),
        *check_host(),
        *flags,
        *started,
        *check_environment(env),
        *check_extras(),
    ]


def as_json(checks: list[Check]) -> str:
    """The checks as a JSON object: `ok`, and the list of findings."""
    return json.dumps({"ok": healthy(checks), "checks": [asdict(c) for c in checks]}, indent=2)


def healthy(checks: list[Check]) -> bool:
    """True when nothing failed (warnings are advice)."""
    return all(c.status != "fail" for c in checks)


# ------------------------------------------------------------------------------------------ software


def check_python(version: tuple[int, ...]) -> list[Check]:
    """Python, and what its version costs: 3.11 ends at jax 0.10.2, whose bfloat16 is slow on a CPU."""
    shown = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return [Check("software", "python", shown, "fail", "jaxalign needs Python 3.11 or newer")]
    if version < (3, 12):
        advice = "Python 3.12 or newer gets a newer jax, whose bfloat16 is several times as fast on a CPU"
        return [Check("software", "python", shown, "warn", advice)]
    return [Check("software", "python", shown)]


def installed_versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed. Imports none of them."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(versions: Mapping[str, str | None]) -> list[Check]:
    """Every package that jaxalign needs, and whether jax and flax fit each other."""
    checks = [Check("software", "jaxalign", _version("jaxalign") or "a source tree, not installed")]
    for name, version in versions.items():
        if version is None:
            checks.append(Check("software", name, "missing", "fail", f"pip install {name}"))
        else:
            checks.append(Check("software", name, version))
    jax, flax = versions.get("jax"), versions.get("flax")
    if jax and flax and (problem := jax_flax_problem(jax, flax)):
        checks.append(Check("software", "jax with flax", f"{jax} with {flax}", "fail", problem))
    return checks


def jax_flax_problem(jax: str, flax: str) -> str:
    """What is wrong with this pair of versions and what to install instead; empty when they fit."""
    if _numbers(jax)[:3] == (0, 11, 0):
        return "no release of flax works with jax 0.11.0: pip install -U jax flax"
    if _numbers(flax) < (0, 12, 9) and _numbers(jax) >= (0, 11, 1):
        return "flax before 0.12.9 does not import with jax 0.11.1 or newer: pip install -U flax"
    if _numbers(flax) >= (0, 12, 9) and _numbers(jax) < (0, 11, 1):
        return "flax 0.12.9 and newer need jax 0.11.1 or newer: pip install -U jax"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:4])


def check_extras() -> list[Check]:
    """Which optional extras are complete."""
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("jaxalign") or [] if _version("jaxalign") else []:
        name, extra = re.match(r"[\w.-]+(?:\[\w+\])?", line), re.search(r"extra == ['\"](\w+)['\"]", line)
        if name and extra:
            extras.setdefault(extra[1], []).append(_provider(name[0]))
    checks = []
    for extra, names in extras.items():
        missing = [n for n in names if _version(n) is None]
        checks.append(Check("extras", extra, f"without {', '.join(missing)}" if missing else "installed"))
    return checks


def _provider(requirement: str) -> str:
    """The distribution that shows an extra of jax to be installed."""
    plugins = {"jax[cuda13]": "jax-cuda13-plugin", "jax[cuda12]": "jax-cuda12-plugin", "jax[tpu]": "libtpu"}
    return plugins.get(requirement, requirement)


# ------------------------------------------------------------------------------------------- machine


def check_host() -> list[Check]:
    """Processor cores that this process may use, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    checks = [Check("machine", "cores", f"{cores} of {os.cpu_count()}")]
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (os.sysconf(n) * page / 2**30 for n in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (ValueError, OSError):  # not told on this system
        return checks
    return [*checks, Check("machine", "memory", f"{total:.1f} GiB, {free:.1f} GiB unused")]


def check_flags(env: Mapping[str, str]) -> list[Check]:
    """Tries `XLA_FLAGS` in a child process: one unknown flag aborts whoever imports jax."""
    flags = env.get("XLA_FLAGS", "").split()
    if not flags:
        return [Check("machine", "XLA_FLAGS", "not set")]
    cpu = {**env, "JAX_PLATFORMS": "cpu"}
    bad = [] if _starts(cpu) else [f for f in flags if not _starts({**cpu, "XLA_FLAGS": f})]
    if not bad:
        return [Check("machine", "XLA_FLAGS", " ".join(flags))]
    advice = f"this jaxlib does not know {', '.join(bad)}; take it out of XLA_FLAGS"
    if any("xla_tpu" in f for f in bad):
        advice += " (TPU flags belong in LIBTPU_INIT_ARGS)"
    return [Check("machine", "XLA_FLAGS", " ".join(flags), "fail", advice)]


def _starts(env: Mapping[str, str]) -> bool:
    return _child("import jax; jax.devices()", env)[0] == 0


def _child(code: str, env: Mapping[str, str], seconds: float = 120) -> tuple[int, str]:
    """(exit status, output) of a piece of Python in a child; status 124 when it did not end in time."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=dict(env), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr


def check_devices(env: Mapping[str, str]) -> list[Check]:
    """The devices that jax finds, their memory, and the mesh that a run takes by default."""
    status, output = _child(_DEVICES, env)
    found = re.search(r"^REPORT(.*)$", output, re.MULTILINE)
    if status or not found:
        last = next(
            (line for line in reversed(output.strip().splitlines()) if line.strip()), f"exit status {status}"
        )
        return [Check("machine", "devices", last, "fail", "jax cannot start its devices; see the message")]
    seen = json.loads(found[1])
    checks = [Check("machine", "devices", f"{seen['count']} x {seen['kind']} ({seen['platform']})")]
    if seen["memory"][0]:
        checks.append(Check("machine", "device memory", f"{seen['memory'][0] / 2**30:.1f} GiB each"))
    mesh = f"data=1 fsdp={seen['count']} tensor=1, {seen['processes']} process(es)"
    return [*checks, Check("machine", "default mesh", mesh), *_idle_accelerator(seen, env)]


def _idle_accelerator(seen: Mapping[str, Any], env: Mapping[str, str]) -> list[Check]:
    """A warning when there is a GPU but jax runs on the CPU without having been told to."""
    if seen["platform"] != "cpu" or "cpu" in env.get("JAX_PLATFORMS", "") or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip()
    if not listed.startswith("GPU"):
        return []
    advice = "pip install 'jaxalign[cuda]' (driver 580 or newer), or 'jaxalign[cuda12]' for an older driver"
    return [Check("machine", "unused GPU", listed.splitlines()[0], "warn", advice)]


def check_cache(env: Mapping[str, str]) -> list[Check]:
    """The folder of compiled programs: can it be written, and does jax write into it?"""
    named = env.get("JAX_COMPILATION_CACHE_DIR", "")
    if "://" in named:
        return [Check("caches", "compiled programs", f"{named} (not tried)")]
    folder = Path(named or cache_folder(env))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as trial:
            status, output = _child(_CACHE, {**env, "JAX_COMPILATION_CACHE_DIR": trial})
            used = any(Path(trial).iterdir())
    except OSError as error:
        advice = "set JAXALIGN_CACHE to a folder that can be written, or every start compiles anew"
        return [Check("caches", "compiled programs", f"{folder}: {error.strerror}", "warn", advice)]
    if status or not used:
        advice = "jax kept no compiled program there, so every start compiles anew: " + output.strip()[-200:]
        return [Check("caches", "compiled programs", str(folder), "warn", advice)]
    free = shutil.disk_usage(folder).free / 2**30
    disk = Check("caches", "free disk", f"{free:.1f} GiB")
    if free < 2:
        disk = Check(
            "caches", "free disk", f"{free:.1f} GiB", "warn", "a model and its checkpoints need more"
        )
    return [Check("caches", "compiled programs", f"{folder} (written and used)"), disk]


def check_environment(env: Mapping[str, str]) -> list[Check]:
    """Who started this process, and the variables that steer jax."""
    names = sorted(n for n in env if n.startswith(("JAX_", "JAXALIGN_", "XLA_", "LIBTPU_", "HF_HUB_OFFLINE")))
    shown = [Check("environment", n, env[n]) for n in names if n != "XLA_FLAGS"]
    return [Check("environment", "started by", launcher(env)), *shown]

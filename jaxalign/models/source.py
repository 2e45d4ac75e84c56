"""From what a user types after `-m` to files on this disk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from jaxalign.errors import UserError, nearest
from jaxalign.models.pull import BUILTINS, builtin_file, is_pulled, pull
from jaxalign.models.store import read_json, safetensors_files
from jaxalign.types import ModelSource

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Subfolders hold other formats, `consolidated` the same weights once more.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_SKIP = ["*/*", "consolidated*"]
_FORMS = (
    "give a built-in name, a hub id (org/name), a folder with config.json and safetensors, a .gguf file, "
    "a PEFT adapter, or the output folder of an earlier run"
)


def resolve(spec: str) -> ModelSource:
    """Find a model: a built-in name, a local path, or a hub id with an optional `@revision`.

    Downloads what is not on this disk yet. An adapter brings its base along, and the source's `name` is then
    the base's. Raises `UserError` with the nearest name or the remedy.
    """
    if spec in BUILTINS:
        file = builtin_file(spec)
        return ModelSource(spec, file.parent, file) if is_pulled(spec) else pull(spec)
    path = Path(spec).expanduser()
    if path.exists():
        return _local(path, spec)
    match = _HUB.fullmatch(spec)
    if match and not spec.startswith((".", "/")):
        return _hub(spec, match["repo"], match["revision"])
    siblings = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
    raise UserError(f"no model {spec!r}{nearest(spec, [*BUILTINS, *siblings])}", remedy=_FORMS)


def _local(path: Path, name: str) -> ModelSource:
    """A file or folder that exists; `name` is what the user called it."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError("is a file, but not a .gguf", place=str(path), remedy=_FORMS)
        return ModelSource(name, path.parent, gguf=path)
    # A run folder: a merged or fully trained model stands for itself, an adapter needs its base.
    for part in ("model", "adapter"):
        if (path / part).is_dir():
            return _local(path / part, name)
    if _is_adapter(path):
        return _adapter(path)
    if (path / "config.json").exists() and safetensors_files(path):
        return ModelSource(name, path)
    return _gguf_folder(path, name)


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").exists() and not safetensors_files(path)


def _gguf_folder(path: Path, name: str) -> ModelSource:
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelSource(name, path, gguf=ggufs[0])
    if ggufs:
        listed = ", ".join(p.name for p in ggufs)
        raise UserError(f"holds several models: {listed}", place=str(path), remedy="name one of the files")
    pickled = list(path.glob("pytorch_model*.bin"))
    missing = "config.json" if not (path / "config.json").exists() else "*.safetensors"
    raise UserError(
        f"is no model folder: it has no {missing}" + (", only pickled weights" if pickled else ""),
        place=str(path),
        remedy="save the model as safetensors" if pickled else _FORMS,
    )


def _adapter(path: Path) -> ModelSource:
    """A PEFT adapter on top of the base that its configuration names."""
    place = f"{path / 'adapter_config.json'}: base_model_name_or_path"
    config = read_json(path / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        remedy = "set it to the model that the adapter was trained on"
        raise UserError("the adapter does not name its base model", place=place, remedy=remedy)
    beside = path / base  # a base that is kept next to its adapter, else whatever the name means here
    spec = str(beside) if beside.exists() else base
    if revision and not Path(spec).exists():
        spec = f"{base}@{revision}"
    folders = (Path(spec), Path(spec) / "adapter")
    if any(_is_adapter(f) for f in folders) and not (Path(spec) / "model").is_dir():
        remedy = "merge the inner adapter first: jaxalign export --format hf"
        raise UserError(f"its base {base!r} is an adapter too", place=place, remedy=remedy)
    try:
        return replace(resolve(spec), adapter=path)
    except UserError as error:
        cause = f"the adapter's base cannot be found: {error.cause}"
        raise UserError(cause, place=error.place or place, remedy=error.remedy) from error


def _hub(spec: str, repo: str, revision: str | None) -> ModelSource:
    """The snapshot of a hub repository, from the local cache where the network is off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    near = nearest(spec, BUILTINS)
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP
        )
    except GatedRepoError as error:
        remedy = "accept its licence on the hub, then log in with `hf auth login` or set HF_TOKEN"
        raise UserError(f"the hub model {repo!r} is gated", remedy=remedy) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = (
            f"revision {revision!r} of {repo!r}" if isinstance(error, RevisionNotFoundError) else repr(spec)
        )
        cause = f"{what} is neither a path here nor on the hub{near}"
        raise UserError(
            cause, remedy=f"check the spelling; if it is private, set HF_TOKEN; or {_FORMS}"
        ) from error
    except Exception as error:  # offline, no such cached snapshot, or whatever else the client raises
        cause = f"{spec!r} is not a path here and the hub cannot be reached{near}: {_first_line(error)}"
        remedy = f"check the network (HF_ENDPOINT, HF_HUB_OFFLINE); or {_FORMS}"
        raise UserError(cause, remedy=remedy) from error
    return _local(Path(folder), spec)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

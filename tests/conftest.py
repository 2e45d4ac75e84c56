"""Eight simulated CPU devices, and no network, for every test. This runs before anything imports JAX."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

# Eight devices on two busy cores may wait for one another longer than the 40 s after which XLA aborts.
DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Tests of tiny models spend their time in XLA's compiler: good code would not pay on small arrays."""
    if "not real_model" in config.option.markexpr:
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lies under tests/parity compares with torch: it carries the marker without saying so."""
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker(pytest.mark.parity)


# Files whose tests share runs or programs that are slow to make: each stays on one worker of pytest-xdist.
# The conformance suite does so method by method, which compiles each method once.
TOGETHER = {
    *(
        f"tests/train/test_{name}.py"
        for name in ("run", "preference_run", "prefix_run", "stages", "assemble")
    ),
    *(f"tests/train/test_{name}.py" for name in ("reference", "score", "invariance", "step")),
    *("tests/rl/test_online.py", "tests/rl/test_iterate.py", "tests/sampling/test_engine.py"),
    *("tests/sampling/test_joining.py", "tests/serve/test_app.py"),
}
# Of whole runs, those that share one; the others fill the workers one by one.
WHOLE = {"tests/test_end_to_end.py", "tests/serve/test_real_server.py"}
BY_PARAMETER = {"tests/conformance/test_objectives.py"}


def scope_of(nodeid: str, together: set[str]) -> str:
    """What a test is kept together with: others of the same scope. By itself it is one."""
    file = nodeid.split("::")[0]
    if file in BY_PARAMETER:
        return nodeid.partition("[")[2]
    return file if file in together else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """One worker for each scope, the largest first. The mark `xdist_group` does nothing in xdist 3.8 under
    pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    together = TOGETHER if "not slow" in config.option.markexpr else WHOLE
    scheduler._split_scope = partial(scope_of, together=together)
    return scheduler


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data sets beside the checkout; skips where it is not there."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder

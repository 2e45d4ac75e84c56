"""The environment report: every finding it can make, on environments made to have it."""

from __future__ import annotations

import json
import os
import sys

import pytest
from typer.testing import CliRunner

from jaxalign import cli, doctor
from jaxalign.doctor import Check, check_python, check_versions, jax_flax_problem

ALL = dict.fromkeys(doctor.PACKAGES, "1.0") | {"jax": "0.12.0.1", "flax": "0.12.12"}


def only(checks: list[Check]) -> Check:
    (check,) = checks
    return check


@pytest.mark.parametrize(
    ("jax", "flax", "problem"),
    [
        ("0.10.2", "0.12.8", ""),
        ("0.11.2", "0.12.9", ""),
        ("0.12.0.1", "0.12.12", ""),
        ("0.13.0", "0.13.0", ""),
        ("0.11.1", "0.12.8", "flax before 0.12.9"),
        ("0.11.2", "0.12.8", "flax before 0.12.9"),
        ("0.10.2", "0.12.9", "need jax 0.11.1"),
        ("0.11.0", "0.12.8", "no release of flax works with jax 0.11.0"),
        ("0.11.0", "0.12.12", "no release of flax works with jax 0.11.0"),
    ],
)
def test_pairs_of_jax_and_flax(jax, flax, problem):
    found = jax_flax_problem(jax, flax)
    assert bool(found) == bool(problem)
    assert problem in found


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "warn"), ((3, 12), "ok"), ((3, 14), "ok")]
)
def test_python_versions(version, status):
    check = only(check_python(version))
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


def test_a_missing_package_fails_and_says_how_to_install_it():
    checks = {c.name: c for c in check_versions(ALL | {"optax": None})}
    assert checks["optax"].status == "fail"
    assert checks["optax"].advice == "pip install optax"
    assert checks["flax"] == Check("software", "flax", "0.12.12")
    assert doctor.healthy(check_versions(ALL))


def test_packages_that_do_not_fit_each_other_fail():
    bad = check_versions(ALL | {"flax": "0.12.8"})
    assert not doctor.healthy(bad)
    assert bad[-1].name == "jax with flax"


def test_an_unknown_flag_is_found_and_named():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_no_such_flag=1"}
    check = only(doctor.check_flags(env))
    assert check.status == "fail"
    assert "does not know --xla_no_such_flag=1;" in check.advice
    assert "LIBTPU_INIT_ARGS" not in check.advice


def test_good_flags_and_no_flags_pass():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert only(doctor.check_flags(env)).status == "ok"
    assert only(doctor.check_flags({})).value == "not set"


def test_devices_are_those_of_a_child_with_this_environment():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    checks = {c.name: c.value for c in doctor.check_devices(env)}
    assert checks["devices"] == "3 x cpu (cpu)"
    assert checks["default mesh"] == "data=1 fsdp=3 tensor=1, 1 process(es)"


def test_a_platform_that_is_not_there_fails():
    check = only(doctor.check_devices({**os.environ, "JAX_PLATFORMS": "no_such_platform"}))
    assert check.status == "fail"
    assert "no_such_platform" in check.value


def test_a_child_that_hangs_is_given_up():
    status, said = doctor._child("import time; time.sleep(60)", os.environ, seconds=1)
    assert status == 124
    assert said == "no answer in 1 s"


def test_the_cache_is_tried_and_left_as_it_was(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    first, disk = doctor.check_cache({**env, "JAXALIGN_CACHE": str(tmp_path)})
    assert (first.status, first.value) == ("ok", f"{tmp_path / 'jax'} (written and used)")
    assert list((tmp_path / "jax").iterdir()) == []
    assert "GiB" in disk.value


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    check = only(doctor.check_cache({**os.environ, "JAX_COMPILATION_CACHE_DIR": str(blocked / "jax")}))
    assert check.status == "warn"
    assert "JAXALIGN_CACHE" in check.advice


def test_a_remote_cache_is_not_tried():
    assert only(doctor.check_cache({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"})).value.endswith(
        "(not tried)"
    )


def test_the_environment_that_steers_jax_is_listed():
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a", "HOME": "/x", "JAXALIGN_CACHE": "/y"}
    names = [c.name for c in doctor.check_environment(env)]
    assert names == ["started by", "JAXALIGN_CACHE", "JAX_PLATFORMS"]


def test_extras_are_read_from_the_installed_package(monkeypatch):
    lines = [
        "jax>=0.10",
        "jax[cuda13]; extra == 'cuda'",
        'pytest>=9; extra == "test"',
        "no-such-package==1; extra == 'bench'",
        "pytest; extra == 'bench'",
    ]
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name in ("jaxalign", "pytest") else None)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    assert [(c.name, c.value) for c in doctor.check_extras()] == [
        ("cuda", "without jax-cuda13-plugin"),
        ("test", "installed"),
        ("bench", "without no-such-package"),
    ]


def test_a_bad_flag_is_the_only_failure_reported(monkeypatch):
    monkeypatch.setattr(
        doctor, "_child", lambda code, env, seconds=120: (-6 if env.get("XLA_FLAGS") else 0, "")
    )
    checks = doctor.examine({"XLA_FLAGS": "--xla_bad=1"})
    assert [c.name for c in checks if c.status == "fail"] == ["XLA_FLAGS"]
    assert "devices" not in [c.name for c in checks]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_command_exits_by_what_it_found(monkeypatch, status, code):
    found = [Check("software", "x", "1 [y]", status, "do this")]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == code
    assert "1 [y]" in shown.output
    assert "do this" in shown.output
    printed = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert printed.exit_code == code
    assert json.loads(printed.stdout) == {
        "ok": status != "fail",
        "checks": [
            {"area": "software", "name": "x", "value": "1 [y]", "status": status, "advice": "do this"}
        ],
    }


def test_python_of_this_process_is_reported():
    assert only(check_python(sys.version_info[:2])).value.startswith(f"{sys.version_info[0]}.")

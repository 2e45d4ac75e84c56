"""The verbs one after another, each in a process of its own, on the real model and published rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).parents[1]
MODEL = "smollm2-135m-instruct"
MAIN = "import sys; sys.argv[0] = 'jaxalign'; from jaxalign.cli import main; main()"


def verb(folder: Path, *args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, on one device, and checks how it ends."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == status, f"{args}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_data) -> Path:
    """A folder with `out`: two steps of LoRA on published preference rows."""
    folder = tmp_path_factory.mktemp("trained")
    rows = str(shared_data / "llama-factory" / "dpo_en_demo.json")
    keys = ("max_steps=2", "batch_size=2", "max_length=128", "lora.rank=4", "learning_rate=1e-3")
    first = verb(folder, "train", "sft", "-m", MODEL, "-d", rows, "-o", "out", *keys)
    assert "finished after 2 steps" in first.stderr
    again = verb(folder, "train", "sft", "-m", MODEL, "-d", rows, "-o", "out", *keys)
    assert "Nothing to do" in again.stderr
    other = verb(
        folder, "train", "sft", "-m", MODEL, "-d", rows, "-o", "out", *keys, "lora.alpha=8", status=2
    )
    assert "lora.alpha: 32.0 -> 8.0" in other.stderr
    assert "Traceback" not in other.stderr
    return folder


def test_a_run_is_a_model(trained):
    shown = verb(trained, "inspect", "model", "-m", "out").stdout
    assert "134,515,008" in shown
    assert "rank: 4" in shown
    assert "<|im_end|> (2)" in shown


def test_the_run_folder_s_configuration_plans_and_starts_again(trained):
    planned = json.loads(
        verb(trained, "plan", "out/config.yaml", "--on", "v5e:1", "--json", "data=null").stdout
    )
    # rank 4: a quarter of the 4,884,480 numbers of rank 16
    assert planned["parameters"]["adapter"] == 4_884_480 // 4
    assert planned["problems"] == []


def test_answers_are_written_once(trained):
    prompts = [
        {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
        {"text": "1, 2, 3,"},
    ]
    (trained / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    command = ("generate", "-m", MODEL, "-d", "prompts.jsonl", "-o", "answers.jsonl")
    verb(trained, *command, "temperature=0", "max_tokens=12")
    written = (trained / "answers.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert "Paris" in rows[0]["completion"]
    assert rows[1]["text"] == "1, 2, 3,"
    assert rows[1]["completion"].strip().startswith("4")
    verb(trained, *command, "temperature=0", "max_tokens=12")
    assert (trained / "answers.jsonl").read_text() == written


def test_a_merged_model_is_a_model(trained):
    printed = verb(trained, "export", "-m", "out", "-o", "merged", "--format", "hf", "--dtype", "bf16").stdout
    assert printed.strip() == "merged"
    config = json.loads((trained / "merged" / "config.json").read_text())
    assert config["num_hidden_layers"] == 30
    assert json.loads((trained / "merged" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert 268e6 < (trained / "merged" / "model.safetensors").stat().st_size < 272e6
    shown = verb(trained, "inspect", "model", "-m", "merged").stdout
    assert "adapter none" in " ".join(shown.split())


def test_the_adapter_alone_names_its_base(trained):
    verb(trained, "export", "-m", "out", "-o", "adapter")
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, MODEL)


def test_chat_answers_and_leaves_at_the_end_of_input(trained):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "chat", "-m", MODEL, "temperature=0", "max_tokens=12"],
        env=env,
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout

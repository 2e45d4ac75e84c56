"""GRPO with LoRA, a rollout and one update a step: jaxalign against TRL's GRPOTrainer.

    python -m benchmarks.grpo --python .venv312/bin/python --peer-python .venv/bin/python \\
        --data conversations.json --out benchmarks/results/grpo.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import contest, stats
from benchmarks.contest import DEFAULT, STYLES
from benchmarks.protocol import OURS, Contender
from benchmarks.rounds import column
from benchmarks.session import Session, exit_code, parser

# fmt: off
COLUMNS = [
    "data", "precision", "threads", "contender", "s/step", "tok/s", "tok/CPU-s", "ours/this",
    "CPU-ours/this", "rollout-s", "score-s", "update-s", "CPU-s/step", "tokens/step", "trained/step",
    "loss-1", "entropy-1", "ready-s", "compile-s", "cold-compile-s", "first-step-s", "peak-MiB",
    "device-MiB", "max-load",
]
# fmt: on
# Weight of the KL divergence in the loss. At 0, the default of both, no reference is computed.
BETA = {"grpo": 0.0, "grpo-reference": 0.04}
LEARNING_RATE = 1e-5
APART = {"apart": True}


def contenders(options: Any, precision: str) -> list[Contender]:
    """Ours, with the prompt of a group computed once and for each answer anew, as TRL does, and TRL's."""
    python, peer, trl = options.python, options.peer_python, "benchmarks.trl_grpo"
    rows = [
        Contender(OURS, "benchmarks.jax_grpo", python),
        Contender(f"{OURS}, a prompt an answer", "benchmarks.jax_grpo", python, options=APART),
    ]
    for suffix, how in STYLES[precision].items():
        rows.append(Contender(f"TRL{suffix}", trl, peer, "TRL", how))
    rows.append(Contender("TRL default (checkpointing)", trl, peer, "TRL default", DEFAULT[precision]))
    return rows


def expected(options: Any) -> int:
    """Tokens that a step generates and trains."""
    return options.prompts * options.answers * options.new_tokens


def check(session: Session, learned: Mapping[str, Any], precision: str) -> dict[str, float]:
    """How far each first loss lies from 0.

    It is 0 where the ratio is 1: advantages of a group add up to 0, and its answers are of one length. What
    was sampled differs, so losses say no more. Raises `DifferentWorkError` for another loss, for a first step
    that no reward told anything, and for other numbers of tokens than were asked for.
    """
    firsts = {name: steps["first"] for name, steps in learned.items()}
    same_tokens(firsts.items(), expected(session.options))
    for name, first in firsts.items():
        loss, limit = first["losses"][0], stats.LOSS_RTOL[precision]
        if not abs(loss) <= limit:
            raise stats.DifferentWorkError(f"{name} begins with the loss {loss:.6f}, not 0 within {limit:g}")
        if first["idle"] == 1:
            raise stats.DifferentWorkError(
                f"{name}: all answers to a prompt had one reward, so nothing moved"
            )
    session.say("  equally many tokens generated and trained, first losses 0")
    return {name: abs(first["losses"][0]) for name, first in firsts.items()}


def same_tokens(told: Iterable[tuple[str, Mapping[str, Any]]], wanted: int) -> None:
    """Raises `DifferentWorkError` where one of `told`, (name, round), generated or trained another number."""
    for name, found in told:
        if not found["tokens"] == found["trained"] == wanted:
            made = "generated {tokens} tokens and trained {trained}".format(**found)
            raise stats.DifferentWorkError(f"{name} {made}, not {wanted}")


def table(
    found: Mapping[str, Any], who: Sequence[Contender], label: Mapping[str, Any], steps: int
) -> list[dict[str, Any]]:
    """Table rows of one case, `steps` steps a round."""
    measured = {r["contender"] for r in found["rounds"]}
    return [{**label, "contender": c.name, **row(found, c, steps)} for c in who if c.name in measured]


def row(found: Mapping[str, Any], contender: Contender, steps: int) -> dict[str, Any]:
    """One contender's cells. The update is what is left of a step: batches, gradients and the optimiser."""
    rounds, name = found["rounds"], contender.name
    first = found["learned"][name]["first"]
    each = {key: column(rounds, name, key) for key in ("wall_s", "cpu_s", "rollout_s", "score_s")}
    spans = zip(each["wall_s"], each["rollout_s"], each["score_s"], strict=True)
    each["update_s"] = [wall - rollout - score for wall, rollout, score in spans]
    a_step = {key: stats.spread([value / steps for value in values]) for key, values in each.items()}
    return {
        "s/step": a_step["wall_s"],
        **contest.pace(found, contender),
        "rollout-s": a_step["rollout_s"].median,
        "score-s": a_step["score_s"].median,
        "update-s": a_step["update_s"].median,
        "CPU-s/step": a_step["cpu_s"].median,
        "tokens/step": max(column(rounds, name, "tokens")) // steps,
        "trained/step": max(column(rounds, name, "trained")) // steps,
        "loss-1": f"{first['losses'][0]:.1e}",
        "entropy-1": first["entropy"],
        **contest.circumstances(found, name),
    }


def case(session: Session, data: str, precision: str, threads: int) -> dict[str, Any]:
    """One precision and thread count, with a reference or without."""
    label, o = {"data": data, "precision": precision, "threads": threads}, session.options
    guard, _ = contest.begin(session, label)
    who = session.chosen(contenders(o, precision))
    job = {"answers": o.answers, "new_tokens": o.new_tokens, "beta": BETA[data]}
    found = contest.hold(session, label, who, guard, check, learning_rate=LEARNING_RATE, **job)
    same_tokens(((r["contender"], r) for r in found["rounds"]), o.steps * expected(o))
    return contest.record(label, found, who, table(found, who, label, o.steps), None)


def orders(options: Any) -> list[dict[str, Any]]:
    """The prompts of the run: rows cut from the data, all of one length."""
    how = {"steps": contest.count(options), "rows": options.prompts, "length": options.prompt_tokens}
    return [{"kind": "fixed", "name": name, "how": how} for name in options.variants]


def main() -> None:
    """Runs every case and prints one table."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--variants", nargs="+", choices=tuple(BETA), default=list(BETA))
    p.add_argument("--prompts", type=int, default=4, help="prompts a step")
    p.add_argument("--answers", type=int, default=4, help="answers to each of them")
    p.add_argument("--prompt-tokens", type=int, default=64, help="tokens of a prompt")
    p.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer, end-of-sequence or not")
    contest.options(p)
    p.set_defaults(steps=1)
    session = Session(p.parse_args())
    session.prepare(orders(session.options))
    o = session.options
    cases = (case(session, d, p, t) for d in o.variants for p in o.precision for t in o.threads)
    notes = ["TRL's answers are by transformers' `generate`, no serving engine"]
    session.finish(__doc__.splitlines()[0], COLUMNS, cases, notes)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""The command line. Verbs are thin: each reads its arguments and calls one function of `jaxalign.api`.

Nothing heavy is imported before a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxalign.errors import UserError, nearest
from jaxalign.registry import BUILDERS, EVALUATIONS, METHODS, Registry

START, WORK, LOOK = "Start here", "Train, use and hand over", "Look before you run"

_ABOUT = "\n\n".join(
    [
        "Align language models in JAX, on CPU, GPU and TPU alike.",
        "[bold]jaxalign quickstart[/] shows the whole loop on a small built-in model, in minutes.",
        "[bold]jaxalign train sft -m MODEL -d rows.jsonl -o out[/] fine-tunes. Then [bold]out[/] is a model:",
        "[bold]jaxalign chat -m out[/]",
        "[bold]jaxalign generate -m out -d prompts.jsonl -o answers.jsonl[/]",
        "[bold]jaxalign export -m out -o merged --format hf[/]",
        "[bold]jaxalign train dpo -m out -d pairs.jsonl -o out2[/] goes on with preferences.",
        "MODEL is a built-in name (smollm2-135m-instruct), a hub id, a folder of safetensors, a .gguf or "
        "the folder of an earlier run. Settings are [bold]key=value[/], with the same keys in YAML files "
        "([bold]-c[/]) and in Python; [bold]jaxalign train sft --help[/] lists them.",
    ]
)

_BUG = """
This is a fault in jaxalign, not in what you typed. Please report it with the lines above and the output of
`jaxalign doctor`."""

app = typer.Typer(
    name="jaxalign",
    help=_ABOUT,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str | None,
    typer.Option("-m", "--model", metavar="MODEL", help="A built-in name, hub id, folder, .gguf or run."),
]
DataOption = Annotated[
    str | None, typer.Option("-d", "--data", metavar="DATA", help="A file, a folder or a hub data set.")
]
OutOption = Annotated[Path | None, typer.Option("-o", "--out", metavar="PATH", help="Where results go.")]
FileOption = Annotated[
    list[Path] | None, typer.Option("-c", "--config", metavar="FILE", help="A YAML file; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HelpOption = Annotated[bool, typer.Option("-h", "--help", help="Show this page, with the keys.")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", show_default=False)]
MethodAndKeys = Annotated[list[str] | None, typer.Argument(metavar="METHOD|KEY=VALUE", show_default=False)]

# Help is ours, so that it can list keys; what looks like an option is told how keys are written (`_sort`).
WITH_KEYS: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True},
}


def verb(panel: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose mistakes are reported as a person would want to read them."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.rstrip("_")
        return app.command(name, rich_help_panel=panel, **options)(_reported(function))

    return register


def _reported(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            _say(f"error: {error}")
            raise typer.Exit(error.status) from None
        except KeyboardInterrupt:
            _say(
                "\ninterrupted; the same command goes on from the last checkpoint or answer, if there is one"
            )
            raise typer.Exit(130) from None
        except (typer.Exit, BrokenPipeError):
            raise
        except Exception as error:
            traceback.print_exc()
            _say(_out_of_memory(error) or _BUG)
            raise typer.Exit(1) from None

    return run


def _out_of_memory(error: Exception) -> str:
    if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
        return ""
    return (
        "\nerror: the device ran out of memory\n  lower batch_size and raise grad_accumulation by as much, "
        "set remat=full, or shorten max_length; `jaxalign train ... --dry-run` shows what takes how much"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    """The entry point of the `jaxalign` command."""
    app()


# ------------------------------------------------------------------------------------- start and work


@verb(START)
def quickstart(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where it works.")] = Path(
        "quickstart"
    ),
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """The whole loop on a small built-in model: fine-tune, answer, compare. Ends with a report."""
    from jaxalign.quickstart import quickstart as run

    run(out, model or "smollm2-135m-instruct")


@verb(WORK, **WITH_KEYS)
def train(
    ctx: typer.Context,
    args: MethodAndKeys = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: OutOption = None,
    config: FileOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan of the run, then stop.")] = False,
    help_: HelpOption = False,
) -> None:
    """Fine-tune a model. The same command goes on where it stopped.

    `jaxalign train METHOD --help` lists the keys of a method.
    """
    method, files, overrides = _sort(args, config)
    if help_:
        _help(ctx, method and _train_rows(method))
        return
    from jaxalign import api

    run = api.read_run(method, files, overrides, _given(model=model, data=data, out=out))
    if dry_run:
        _print_plan(api.plan_of(run), False)
        return
    api.start(run)


@verb(WORK, **WITH_KEYS)
def generate(
    ctx: typer.Context,
    args: Keys = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: OutOption = None,
    config: FileOption = None,
    help_: HelpOption = False,
) -> None:
    """Answer every row of a file. Rows that are answered already are skipped.

    Rows with `messages` go through the chat template, rows with `text` are continued as they stand.
    """
    files, overrides = _only_keys(args, config)
    if help_:
        _help(ctx, _generate_rows())
        return
    from jaxalign import api

    needed = _needed(model=("-m", model), data=("-d", data), out=("-o", out))
    api.generate(config=files, overrides=overrides, **needed)


@verb(WORK, **WITH_KEYS)
def chat(
    ctx: typer.Context,
    args: Keys = None,
    model: ModelOption = None,
    config: FileOption = None,
    help_: HelpOption = False,
) -> None:
    """Talk to a model in the terminal."""
    files, overrides = _only_keys(args, config)
    if help_:
        _help(ctx, _generate_rows())
        return
    from jaxalign import api

    api.chat(config=files, overrides=overrides, **_needed(model=("-m", model)))


@verb(WORK, **WITH_KEYS)
def serve(
    ctx: typer.Context,
    args: Keys = None,
    model: ModelOption = None,
    config: FileOption = None,
    help_: HelpOption = False,
) -> None:
    """Answer OpenAI-compatible requests over HTTP, until it is stopped."""
    files, overrides = _only_keys(args, config)
    if help_:
        _help(ctx, _serve_rows())
        return
    from jaxalign import api

    api.serve(config=files, overrides=overrides, **_needed(model=("-m", model)))


@verb(WORK, **WITH_KEYS)
def build(
    ctx: typer.Context,
    args: MethodAndKeys = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: OutOption = None,
    config: FileOption = None,
    help_: HelpOption = False,
) -> None:
    """Make data to align with: pairs, ratings, rows to imitate. The same command goes on where it stopped.

    MODEL may also be an endpoint, http(s)://host/v1#model. `jaxalign build METHOD --help` lists the keys of a
    method.
    """
    method, files, overrides = _sort(args, config)
    if help_:
        _help(ctx, method and _build_rows(method), BUILDERS)
        return
    if method is None:
        raise UserError("no builder is named", remedy=f"name one of: {', '.join(BUILDERS)}")
    from jaxalign import api

    asked = {"data": ("-d", data)} if BUILDERS[method].data else {}
    needed: dict[str, Any] = {"data": data, **_needed(**asked, out=("-o", out))}
    report = api.build(method, model, config=files, overrides=overrides, **needed)
    left_out = report["dropped"] | report["rejects"]
    for reason, count in left_out.items():
        print(f"left out {count}: {reason}")
    print(f"{report['n_out']} records from {report['n_in']} items: {needed['out']}")


@verb(WORK, **WITH_KEYS)
def evaluate(
    ctx: typer.Context,
    args: MethodAndKeys = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: OutOption = None,
    config: FileOption = None,
    help_: HelpOption = False,
) -> None:
    """Judge a model on data. Ends with a report.

    reward: how often a reward model scores the chosen answer higher.

    best_of_n: the reward of the best of N answers over their KL, beside tuned runs.

    redteam: how often attacks succeed, by category, with and without defences.

    `jaxalign evaluate METHOD --help` lists the keys of a method.
    """
    method, files, overrides = _sort(args, config)
    if help_:
        _help(ctx, method and _evaluate_rows(method), EVALUATIONS)
        return
    if method is None:
        raise UserError("no evaluation is named", remedy=f"name one of: {', '.join(EVALUATIONS)}")
    from jaxalign import api

    needed = _needed(model=("-m", model), data=("-d", data), out=("-o", out))
    report = api.evaluate(method, config=files, overrides=overrides, **needed)
    for line in EVALUATIONS[method].lines(report):
        print(line)
    print(f"report: {needed['out'] / 'report.html'}")


@verb(WORK)
def export(
    model: Annotated[str, typer.Option("-m", "--model", metavar="RUN", help="A run, or any model.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The folder to write.")],
    format: Annotated[
        str, typer.Option("--format", metavar="peft|hf", help="The adapter alone, or a merged model.")
    ] = "peft",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="f32|bf16", help="Weights of a merged model.")
    ] = "f32",
) -> None:
    """Write what `peft` or `transformers` load: an adapter, or the model with the adapter merged in."""
    from jaxalign import api

    print(api.export(model=model, out=out, format=format, dtype=dtype))


@verb(START)
def pull(name: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Download a model into the cache, so that a run needs no network."""
    from jaxalign import api

    print(api.pull(name))


# ------------------------------------------------------------------------------------------------ look


@verb(LOOK)
def inspect(
    what: Annotated[str, typer.Argument(metavar="data|model")],
    model: ModelOption = None,
    data: DataOption = None,
    keys: Keys = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows to show.")] = 3,
) -> None:
    """Show what training will see: tokens and loss masks of rows, or the make of a model."""
    from jaxalign import api
    from jaxalign.terminal import show_facts

    kinds: dict[str, Callable[[], None]] = {
        "data": lambda: api.inspect_data(
            rows=rows, overrides=keys or (), **_needed(model=("-m", model), data=("-d", data))
        ),
        "model": lambda: show_facts(api.inspect_model(**_needed(model=("-m", model)))),
    }
    if what not in kinds:
        raise UserError(f"inspect takes data or model, not {what!r}{nearest(what, kinds)}")
    kinds[what]()


@verb(LOOK, **WITH_KEYS)
def plan(
    ctx: typer.Context,
    args: MethodAndKeys = None,
    model: ModelOption = None,
    data: DataOption = None,
    config: FileOption = None,
    on: Annotated[
        str | None, typer.Option("--on", metavar="KIND:COUNT", help="Devices, such as h100:8; else these.")
    ] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.4,
    as_json: JsonOption = False,
    help_: HelpOption = False,
) -> None:
    """Work out memory, FLOPs and time of a training run. Reads no weights.

    Takes what `train` takes: a METHOD with -m, or a YAML file that names both.
    """
    method, files, overrides = _sort(args, config)
    if help_:
        _help(ctx, method and _train_rows(method))
        return
    from jaxalign import api

    run = api.read_run(method, files, overrides, _given(model=model, data=data), needs=("model",))
    _print_plan(api.plan_of(run, on=on, mfu=mfu), as_json)


@verb(LOOK)
def doctor(as_json: JsonOption = False) -> None:
    """Report versions, devices, caches and what is wrong with them, for you and for a bug ticket."""
    from jaxalign import doctor as clinic
    from jaxalign.terminal import show_checks

    checks = clinic.examine()
    print(clinic.as_json(checks)) if as_json else show_checks(checks)
    if not clinic.healthy(checks):
        raise typer.Exit(1)


# --------------------------------------------------------------------------------------------- arguments


def _sort(args: list[str] | None, config: list[Path] | None) -> tuple[str | None, list[Path], list[str]]:
    """(method, YAML files, overrides) out of the words of a command."""
    method, files, overrides = None, list(config or []), []
    for word in args or []:
        key = word.lstrip("-").partition("=")[0]
        if word.startswith("-"):
            raise UserError(
                f"unknown option {word!r}", remedy=f"keys are written without dashes: {key}=VALUE"
            )
        if "=" in word:
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")):
            files.append(Path(word))
        elif method is None:
            method = word
        else:
            raise UserError(f"{word!r} is neither key=value nor a .yaml file")
    return method, files, overrides


def _only_keys(args: list[str] | None, config: list[Path] | None) -> tuple[list[Path], list[str]]:
    word, files, overrides = _sort(args, config)
    if word is not None:
        raise UserError(f"{word!r} is neither key=value nor a .yaml file")
    return files, overrides


def _needed(**options: tuple[str, Any]) -> dict[str, Any]:
    """{name: value} of options that must be there. Raises `UserError` that names those that are not."""
    missing = [f"{flag} {name.upper()}" for name, (flag, value) in options.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")
    return {name: value for name, (_, value) in options.items()}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# ------------------------------------------------------------------------------------------------ output


def _train_rows(method: str) -> Any:
    from jaxalign.api import method_settings
    from jaxalign.config import describe

    return describe(method_settings(method))


def _build_rows(method: str) -> Any:
    from jaxalign.config import describe

    return describe(BUILDERS[method].config)


def _evaluate_rows(method: str) -> Any:
    from jaxalign.config import describe

    return describe(EVALUATIONS[method].config)


def _generate_rows() -> Any:
    from jaxalign.api import generate_settings
    from jaxalign.config import describe

    return describe(generate_settings())


def _serve_rows() -> Any:
    from jaxalign.api import serve_settings
    from jaxalign.config import describe

    return describe(serve_settings())


def _help(ctx: typer.Context, rows: Any, methods: Registry = METHODS) -> None:
    """The command's page; below it the keys, or the methods where none was named."""
    from jaxalign.terminal import show_keys

    print(ctx.get_help())
    if rows:
        show_keys(rows)
    else:
        verb = ctx.command.name
        print(f"METHOD is one of: {', '.join(methods)}. Their keys: jaxalign {verb} METHOD --help\n")


def _print_plan(plan: Any, as_json: bool) -> None:
    from jaxalign.terminal import show_plan

    print(json.dumps(plan.as_dict(), indent=2)) if as_json else show_plan(plan)
    if plan.problems:
        raise typer.Exit(1)

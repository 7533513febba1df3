"""The commands of `think-compile`: demo, generate, explain, eval and lm-eval."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

import think_compile as tc
from think_compile import hf, terminal

app = typer.Typer(
    help="Prunes the key cache of decoder models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULTS = tc.ThinkConfig()
BAD_INPUT = (ValueError, TypeError, OSError, ImportError, tc.NothingRewritten)
DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Model = Annotated[str, typer.Argument(help="A folder, a .gguf file or a hub id.", metavar="MODEL")]
Ratio = Annotated[
    float | None,
    typer.Option(help="Share of the key channels to drop, in [0, 1); 0.5 without --keys.", show_default=False),
]
_PLAN = (
    "{}: bits:share+bits:share (8:0.25+4:0.75), one number of bits, or lossless, balanced, small; "
    "or mustafar:ratio, the largest numbers of each token."
)
Keys = Annotated[str | None, typer.Option(help=_PLAN.format("Bits of the key channels"), show_default=False)]
Values = Annotated[str | None, typer.Option(help=_PLAN.format("Bits of the value channels"), show_default=False)]
Group = Annotated[int, typer.Option(help="Tokens that are encoded together, with codes of 8, 4 or 2 bits.")]
Sinks = Annotated[
    int | None, typer.Option(help="First tokens that stay whole; 4 with codes, else 0.", show_default=False)
]
Recent = Annotated[int, typer.Option(help="Latest tokens whose keys stay whole.")]
Observe = Annotated[int, typer.Option(help="Latest queries of the prompt that score the channels.")]
Multiple = Annotated[int, typer.Option(help="Kept channels are rounded up to a multiple of this.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; auto is the checkpoint's own.")]
Tokens = Annotated[
    str | None,
    typer.Option(
        help="Which tokens of the prompt are stored: snapkv, h2o or kvcrush, and how many, or what share of them "
        "(snapkv:1024, h2o:0.25); by default all.",
        metavar="RULE:BUDGET",
        show_default=False,
    ),
]
Decode = Annotated[
    bool, typer.Option("--decode", help="Also store caches that are not read as they are stored (latents), in codes.")
]
Sliding = Annotated[bool, typer.Option("--sliding", help="Also prune layers that keep a bounded window of tokens.")]
Lowering = Annotated[
    str | None,
    typer.Option(help="inductor or eager; by default inductor if there is a C++ compiler.", show_default=False),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if any layer cannot be rewritten.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the model.")]


@app.command()
def demo(
    ratio: Ratio = None,
    keys: Keys = None,
    values: Values = None,
    tokens: Tokens = None,
    device: Device = "cpu",
    max_new_tokens: NewTokens = 64,
    lowering: Lowering = None,
    model: Annotated[
        str | None, typer.Option(help="Use this model instead of fetching one.", show_default=False)
    ] = None,
) -> None:
    """Finds a fact in about 2,000 tokens, plain and pruned, with SmolLM2-135M-Instruct; compares the two."""
    with one_line_errors() as console:
        from think_compile.demo import run_demo

        options = _think_options(console, lowering, ratio=ratio, keys=keys, values=values, tokens=tokens)
        run_demo(console, options, device=_device(device), max_new_tokens=max_new_tokens, source=model)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file that holds the prompt.", show_default=False)
    ] = None,
    ratio: Ratio = None,
    keys: Keys = None,
    values: Values = None,
    group: Group = DEFAULTS.group,
    sinks: Sinks = None,
    recent: Recent = DEFAULTS.recent,
    observe: Observe = DEFAULTS.observe,
    channel_multiple: Multiple = DEFAULTS.channel_multiple,
    tokens: Tokens = None,
    decode: Decode = DEFAULTS.decode,
    sliding: Sliding = DEFAULTS.sliding,
    max_new_tokens: NewTokens = 128,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    lowering: Lowering = None,
    strict: Strict = False,
    trust_remote_code: Trust = False,
    chat: Annotated[
        bool | None,
        typer.Option(help="Use the chat template; by default if the model has one.", show_default=False),
    ] = None,
) -> None:
    """Generates greedily with a pruned key cache, then says what was stored."""
    with one_line_errors() as console:
        text = _prompt(prompt, prompt_file)
        options = _think_options(
            console,
            lowering,
            ratio=ratio,
            keys=keys,
            values=values,
            group=group,
            sinks=sinks,
            recent=recent,
            observe=observe,
            channel_multiple=channel_multiple,
            tokens=tokens,
            decode=decode,
            sliding=sliding,
            strict=strict,
        )
        where = _load_options(device, dtype, trust_remote_code)
        network, tokenizer = hf.load_model(model, **where)
        chat = bool(tokenizer.chat_template) if chat is None else chat
        inputs = terminal.encode(tokenizer, text, chat=chat, device=where["device"])
        network = tc.think_compile(network, **options)
        # The name keeps the cache alive: the report counts live caches.
        generation = terminal.stream_generation(network, tokenizer, inputs, max_new_tokens, console)
        console.rule(f"{len(generation.tokens)} tokens; {generation.seconds:.1f} s this run, compiling included")
        console.print(terminal.summary(tc.report(network)), highlight=False)


@app.command()
def explain(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, a .gguf file or a hub id.", metavar="MODEL", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json, in place of a model.", show_default=False)] = None,
    ratio: Ratio = None,
    keys: Keys = None,
    values: Values = None,
    group: Group = DEFAULTS.group,
    sinks: Sinks = None,
    recent: Recent = DEFAULTS.recent,
    observe: Observe = DEFAULTS.observe,
    channel_multiple: Multiple = DEFAULTS.channel_multiple,
    tokens: Tokens = None,
    decode: Decode = DEFAULTS.decode,
    sliding: Sliding = DEFAULTS.sliding,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt that is traced.")] = 128,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    lowering: Lowering = None,
    strict: Strict = False,
    trust_remote_code: Trust = False,
) -> None:
    """Says, layer by layer, what would be rewritten and what not, and why. Reads no weights."""
    with one_line_errors() as console:
        source = _model_or_config(model, config)
        options = _think_options(
            console,
            lowering,
            ratio=ratio,
            keys=keys,
            values=values,
            group=group,
            sinks=sinks,
            recent=recent,
            observe=observe,
            channel_multiple=channel_multiple,
            tokens=tokens,
            decode=decode,
            sliding=sliding,
            strict=strict,
        )
        where = _load_options(device, dtype, trust_remote_code)
        report = hf.explain(source, prompt_tokens, **where, **options)
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        if strict and report.problems:
            raise tc.NothingRewritten(f"--strict, and left as it was: {report.problems[0].sentence}")


@app.command("eval")
def evaluate(
    tasks: Annotated[str, typer.Option(help="Task names, separated by commas: ours, lm-eval's, paths of YAML files.")],
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a .gguf file or a hub id; by default the demo's model.", show_default=False),
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Ratios, separated by commas; 0,0.5 without --keys.", show_default=False)
    ] = None,
    keys: Keys = None,
    values: Values = None,
    group: Group = DEFAULTS.group,
    sinks: Sinks = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "think",
    recent: Recent = DEFAULTS.recent,
    observe: Observe = DEFAULTS.observe,
    channel_multiple: Multiple = DEFAULTS.channel_multiple,
    tokens: Tokens = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of a task.", show_default=False)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question.", show_default=False)
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Sequences of a call, or auto.")] = "1",
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as a user's turn.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the records; runs found there are not run again.")] = Path(
        "eval-records"
    ),
    device: Device = "cpu",
    dtype: Dtype = "auto",
    lowering: Annotated[str, typer.Option(help="eager, or inductor, which compiles each kind of call.")] = "eager",
    trust_remote_code: Trust = False,
) -> None:
    """Scores tasks of lm-evaluation-harness through the pruned cache, beside the dense model."""
    with one_line_errors() as console:
        _require_lm_eval()
        from think_compile.evals import command
        from think_compile.evals.runner import Protocol

        plans = {"keys": keys, "values": values, "group": group, "sinks": sinks, "tokens": tokens}
        options = _think_options(
            console, lowering, **plans, recent=recent, observe=observe, channel_multiple=channel_multiple
        )
        command.run_eval(
            console,
            source=model,
            tasks=command.listed(tasks, "--tasks"),
            methods=command.settings_from(methods, ratio, **options),
            protocol=Protocol(limit, num_fewshot, apply_chat_template),
            batch_size=command.batch_size_from(batch_size),
            folder=output,
            where=_load_options(device, dtype, trust_remote_code),
        )


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """The command of lm-evaluation-harness, which finds the model `think` and our tasks as well."""
    with one_line_errors():
        _require_lm_eval()
        from think_compile.evals.command import run_lm_eval

        run_lm_eval(context.args)


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("evaluating needs lm_eval: pip install 'think-compile[eval]'")


@contextmanager
def one_line_errors() -> Iterator[Console]:
    """Shows what our API says about bad input as one sentence, exit status 2; yields a console."""
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("default", tc.ThinkWarning)  # messages of the command, whatever Python ignores
        warnings.showwarning = lambda message, *_: _complain("warning", message)
        try:
            yield Console()
        except Exception as error:
            # Dynamo wraps what is raised while it compiles
            cause = getattr(error, "inner_exception", error)
            if not isinstance(cause, BAD_INPUT):
                raise
            _complain("error", cause)
            raise typer.Exit(2) from None


def _complain(kind: str, what: Warning | Exception | str) -> None:
    typer.echo(f"think-compile: {kind}: {' '.join(str(what).split())}", err=True)


def _think_options(console: Console, lowering: str | None, **options: Any) -> dict[str, Any]:
    """Keyword arguments of ``think_compile``, checked here so that bad ones fail before a model is loaded."""
    if lowering is None:
        lowering = "inductor" if _has_cpp_toolchain() else "eager"
        if lowering == "eager":
            console.print("No C++ compiler with Python headers is here: lowering=eager.", highlight=False)
    options["lowering"] = lowering
    for side in ("keys", "values"):
        if options.get(side) is not None:
            options[side] = plan_from(options[side])
    tc.ThinkConfig(**options)
    return options


def plan_from(text: str) -> int | str:
    """A bit plan as a command line gives it."""
    return int(text) if text.isdecimal() else text


def _has_cpp_toolchain() -> bool:
    """Whether Inductor (CPU) and Triton (CUDA) find what they build their launchers with."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return header.is_file() and any(shutil.which(name) for name in compilers if name)


def _load_options(device: str, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return {"device": _device(device), "dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return device


def _model_or_config(model: str | None, config: Path | None) -> str | Path:
    if (model is None) == (config is None):
        raise ValueError("give exactly one of MODEL and --config")
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"no such file: {config}")
    return model if model is not None else config  # type: ignore[return-value]


def _prompt(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise ValueError("give exactly one of --prompt and --prompt-file")
    return text if text is not None else file.read_text(encoding="utf-8")  # type: ignore[union-attr]

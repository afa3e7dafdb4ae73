"""The command line: commands by name, each loaded when it runs; the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import typer
from typer.exceptions import TyperException

from peftc.cli.console import waiting
from peftc.errors import PeftcError, no_room

DONE, YOURS, OURS, INTERRUPTED = 0, 1, 2, 130

# Where each command is, and what `peftc --help` says of it. torch takes seconds to load, so a command's own
# module is imported when that command is named.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "plan": ("plan:plan", "Show what a spec does to a model, without building weights."),
    "compile": (
        "compile:compile",
        "Compile a spec onto a model, check it by numbers, save the deltas.",
    ),
    "train": ("train:train", "Train a method by a recipe and save its deltas."),
    "eval": (
        "eval:evaluate",
        "Score deltas or a checkpoint on data, by the recipe that they were trained by.",
    ),
    "prune": (
        "prune:prune",
        "Keep the largest entries of what deltas change in the weights, exactly so many.",
    ),
    "merge": (
        "merge:merge",
        "Fold deltas into their backbone and write an ordinary Hugging Face checkpoint.",
    ),
    "export": ("export:export", "Write an ONNX bundle that `peftc run` and ONNX Runtime serve."),
    "run": ("run:run", "Answer with an ONNX bundle, by its task; one line for each text."),
    "verify": (
        "verify:verify",
        "Check deltas, a merged checkpoint or a bundle again, on a grid of batches.",
    ),
    "bench": (
        "bench:bench",
        "Time a bundle: latencies, tokens a second, and beside torch with --model.",
    ),
    "report": (
        "report:report_",
        "Show what the compiler did to a model: its spec, its graph, its ONNX nodes, linked on one page.",
    ),
    "doctor": (
        "doctor:doctor",
        "Tell what is installed, what really runs, and what conflicts. Exit code 1 when something does.",
    ),
    "specs": ("language:specs", "List the shipped specs, or print one: the start of your own."),
    "new": (
        "language:new",
        "Write a commented skeleton of a spec to NAME.yaml, or a copy of another spec.",
    ),
    "schema": (
        "language:schema",
        "Print the JSON Schema of the spec language, for editors that complete and check.",
    ),
    "import": ("peft:import_", "Turn a PEFT adapter into a spec and deltas."),
    "export-peft": (
        "peft:export_peft",
        "Write LoRA-like deltas as a PEFT adapter, for vLLM and others.",
    ),
    "completion": (
        "completion:completion",
        "Print what completes commands, options, specs and recipes in a shell.",
    ),
}

_HELP = """A compiler for parameter-efficient fine-tuning: a method is a YAML file.

\b
peftc plan mam --model facebook/bart-large --random-weights
peftc train mam --model ./bert --data train.jsonl -o deltas
peftc merge deltas -o merged
peftc export deltas -o bundle
peftc run bundle "some text"
"""


# What transformers loads with itself where torchao is there, and what warns of that.
_TALKERS = ("torchao", "torch.utils._pytree")


def command(name: str) -> Callable[..., None]:
    """The function behind a command; loads its module, which on a terminal says so while torch loads."""
    module, _, function = COMMANDS[name][0].partition(":")
    for talker in _TALKERS:
        logging.getLogger(talker).setLevel(logging.ERROR)
    with waiting("loading"):
        home = importlib.import_module(f"peftc.cli.{module}")
    found: Callable[..., None] = getattr(home, function)
    return found


def _unloaded() -> None:
    """A command that is listed and not run."""


def app(named: str | None) -> typer.Typer:
    """The commands as one program, of which `named` is loaded; help is plain text when it goes to a pipe."""
    one = typer.Typer(
        name="peftc",
        help=_HELP,
        add_completion=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    )
    for name, (_, line) in COMMANDS.items():
        if name == named:
            one.command(name)(command(name))
        else:
            one.command(name, help=line)(_unloaded)
    return one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done. 1: the input is wrong, told in one message. 2: our fault, with a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    named = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        program = app(named)
        code = program(list(arguments) or ["--help"], prog_name="peftc", standalone_mode=False)
    except TyperException as error:
        see = " ".join(["peftc", *([named] if named else []), "--help"])
        return _fail(f"{error.format_message()} (see: {see})")
    except PeftcError as error:
        return _fail(str(error))
    except typer.Abort:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `peftc specs | head`
        sys.stderr.close()
        return DONE
    except (
        Exception
    ) as error:  # the boundary: what is neither the disk nor a file is a bug of peftc
        if no_room(error):
            place = getattr(error, "filename", None) or "this machine"
            return _fail(f"{place}: no room on the disk; make some and run it again")
        if isinstance(error, OSError) and error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}")
        return _bug()
    return int(code or DONE)


def _bug() -> int:
    traceback.print_exc()
    return _fail("this is a bug of peftc; please report it with the lines above", OURS)


def _fail(message: str, code: int = YOURS) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code

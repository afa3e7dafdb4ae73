"""The command line: one small module for each command, and the one place where errors become exit codes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

import typer
from typer.exceptions import TyperException

from peftc.commands import (
    compiling,
    exporting,
    language,
    merging,
    peft,
    planning,
    pruning,
    training,
    verifying,
)
from peftc.errors import PeftcError

DONE, YOURS, OURS = 0, 1, 2

COMMANDS: tuple[Callable[..., None], ...] = (
    planning.plan,
    compiling.compile,
    training.train,
    pruning.prune,
    merging.merge,
    exporting.export,
    exporting.run,
    verifying.verify,
    language.specs,
    language.new,
    language.schema,
    peft.import_,
    peft.export_peft,
)

_HELP = """A compiler for parameter-efficient fine-tuning: a method is a YAML file.

\b
peftc plan mam --model facebook/bart-large --random-weights
peftc train mam --model ./bert --data train.jsonl -o deltas
peftc merge deltas -o merged
peftc export deltas -o bundle
peftc run bundle "some text"
"""


def name_of(command: Callable[..., None]) -> str:
    """What is typed: `export-peft`, and `import` for a function that Python will not let be called so."""
    return command.__name__.rstrip("_").replace("_", "-")


def app() -> typer.Typer:
    """The commands as one program; help is plain text when it goes to a pipe."""
    one = typer.Typer(
        name="peftc",
        help=_HELP,
        add_completion=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    )
    for command in COMMANDS:
        one.command(name_of(command))(command)
    return one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done. 1: the input is wrong, told in one message. 2: our fault, with a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app()(list(arguments) or ["--help"], prog_name="peftc", standalone_mode=False)
    except TyperException as error:
        return _fail(error.format_message() + _usage(arguments))
    except PeftcError as error:
        return _fail(str(error))
    except typer.Abort:
        return _fail("interrupted")
    except BrokenPipeError:  # `peftc specs | head`
        sys.stderr.close()
        return DONE
    except Exception:  # the boundary: everything else is a bug of peftc
        traceback.print_exc()
        return _fail("this is a bug of peftc; please report it with the lines above", OURS)
    return int(code or DONE)


def _usage(arguments: Sequence[str]) -> str:
    names = {name_of(command) for command in COMMANDS}
    named = [one for one in arguments if one in names][:1]
    return f" (see: {' '.join(['peftc', *named, '--help'])})"


def _fail(message: str, code: int = YOURS) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code

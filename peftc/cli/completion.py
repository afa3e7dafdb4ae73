"""`peftc completion`: what a shell completes of commands, options, shipped specs and recipes, as a script of its own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Literal

import typer

from peftc.cli.console import raw
from peftc.cli.main import COMMANDS, app
from peftc.language import shelf
from peftc.training import recipe

Shell = Annotated[
    Literal["bash", "zsh", "fish"],
    typer.Argument(metavar="bash|zsh|fish", help="The shell that reads it."),
]
_BASH = """_peftc() {{
    local words=
    case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
        1:*) words="{commands}" ;;
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _peftc peftc"""


def completion(shell: Shell) -> None:
    """Print what completes commands, options, specs and recipes in a shell.

    \b
    peftc completion bash > ~/.local/share/bash-completion/completions/peftc
    peftc completion fish > ~/.config/fish/completions/peftc.fish
    """
    words = {name: words_of(name) for name in COMMANDS}
    if shell == "fish":
        return raw(_fish(words))
    cases = "\n".join(
        f'        *:{name}) words="{" ".join(one)}" ;;' for name, one in words.items()
    )
    script = _BASH.format(commands=" ".join(COMMANDS), cases=cases)
    raw(f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script)


def words_of(name: str) -> tuple[str, ...]:
    """Of a command: its long options, and the shipped names that it takes."""
    program = typer.main.get_command(app(name))
    params = program.commands[name].params  # type: ignore[attr-defined]  # a program of several commands
    options = [one for param in params for one in param.opts if one.startswith("--")]
    takes_specs = {"specs", "name"} & {param.name for param in params} and name != "new"
    found = (*shelf.shipped(),) if takes_specs else ()
    return (*options, *found, *(recipe.shipped() if "--recipe" in options else ()))


def _fish(words: Mapping[str, tuple[str, ...]]) -> str:
    lines = [
        f"complete -c peftc -n __fish_use_subcommand -a {name} -d {shlex.quote(line)}"
        for name, (_, line) in COMMANDS.items()
    ]
    for name, found in words.items():
        seen = f"complete -c peftc -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{seen} -l {one[2:]}" for one in found if one.startswith("--")]
        if names := " ".join(one for one in found if not one.startswith("--")):
            lines.append(f"{seen} -a '{names}'")
    return "\n".join(lines)

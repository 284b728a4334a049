"""Completion scripts for bash, zsh and fish, made from the parser itself, so that they can't go stale.

The one rule: a script runs nothing of ours; it knows commands, options, their choices, and where a file goes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Option(NamedTuple):
    """One option or positional argument (no `flags`)."""

    flags: tuple[str, ...]
    text: str
    takes_value: bool
    choices: tuple[str, ...]
    is_file: bool
    repeats: bool


class Command(NamedTuple):
    """One command; the name of the program itself is empty."""

    name: str
    text: str
    options: tuple[Option, ...]

    @property
    def flags(self) -> list[str]:
        """Every spelling of every option."""
        return [flag for option in self.options for flag in option.flags]

    @property
    def positionals(self) -> list[Option]:
        """What stands without a flag."""
        return [option for option in self.options if not option.flags]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `shell`: bash, zsh or fish."""
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return "\n".join(makers[shell](list(commands(parser)))) + "\n"


def commands(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """The program's own options, then each command in the order of its help."""
    yield Command("", parser.description or "", tuple(_options(parser)))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield Command(name, texts.get(name, ""), tuple(_options(command)))


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        yield Option(
            flags=tuple(action.option_strings),
            text=" ".join((action.help or action.metavar or action.dest).replace("%%", "%").split())
            if isinstance(action.metavar, str | None)
            else "",
            takes_value=action.nargs != 0,
            choices=tuple(map(str, action.choices or ())),
            is_file=action.type is Path,
            repeats=isinstance(action, argparse._AppendAction),
        )


# -- bash ------------------------------------------------------------------------------------------


def _bash(found: list[Command]) -> list[str]:
    names = " ".join(command.name for command in found if command.name)
    return [
        "# bash completion for llorch; made by: llorch completion bash",
        "_llorch() {",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} name= word",
        "    COMPREPLY=()",
        "    # bash cuts --option=value into three words",
        "    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        "        if [[ $word != -* ]]; then name=$word; break; fi",
        "    done",
        '    case "$name:$prev" in',
        *(line for command in found for line in _bash_values(command)),
        "    esac",
        "    local words= files=",
        "    case $name in",
        *(line for command in found for line in _bash_words(command, names)),
        "    esac",
        '    if [[ $cur != -* && -n $files ]]; then _llorch_files "$cur"; return; fi',
        '    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")',
        "}",
        "_llorch_files() {",
        "    compopt -o filenames 2>/dev/null",
        '    mapfile -t COMPREPLY < <(compgen -f -- "$1")',
        "}",
        "complete -F _llorch llorch",
    ]


def _bash_values(command: Command) -> Iterator[str]:
    for option in command.options:
        if not option.flags or not option.takes_value:
            continue
        pattern = "|".join(f"{command.name}:{flag}" for flag in option.flags)
        if option.choices:
            words = _quoted(" ".join(option.choices))
            done = f'mapfile -t COMPREPLY < <(compgen -W {words} -- "$cur")'
        else:
            done = '_llorch_files "$cur"' if option.is_file else ":"
        yield f"        {pattern}) {done}; return ;;"


def _bash_words(command: Command, names: str) -> Iterator[str]:
    choices = [choice for option in command.positionals for choice in option.choices]
    words = [*choices, *command.flags] if command.name else [names, *command.flags]
    files = " files=1" if any(option.is_file for option in command.positionals) else ""
    yield f"        {command.name or _quoted('')}) words={_quoted(' '.join(words))}{files} ;;"


# -- zsh -------------------------------------------------------------------------------------------


def _zsh(found: list[Command]) -> list[str]:
    program, *rest = found
    return [
        "#compdef llorch",
        "# zsh completion for llorch; made by: llorch completion zsh",
        "_llorch() {",
        "    local -a commands",
        "    commands=(",
        *(f"        {_quoted(f'{_colons(command.name)}:{_colons(command.text)}')}" for command in rest),
        "    )",
        "    local curcontext=$curcontext state line",
        "    typeset -A opt_args",
        *_zsh_arguments(program, "    ", ["'1:command:->command'", "'*::argument:->argument'"]),
        "    case $state in",
        "        command) _describe -t commands 'llorch command' commands ;;",
        "        argument)",
        "            case $words[1] in",
        *(line for command in rest for line in _zsh_case(command)),
        "            esac ;;",
        "    esac",
        "}",
        'if [[ $funcstack[1] == _llorch ]]; then _llorch "$@"; else compdef _llorch llorch; fi',
    ]


def _zsh_case(command: Command) -> Iterator[str]:
    positionals = [
        _quoted(f"::{_colons(_brackets(option.text))}:{_zsh_action(option)}")
        for option in command.positionals
        if option.choices or option.is_file  # a hint for free text would keep zsh from completing options
    ]
    yield f"                {command.name})"
    yield from _zsh_arguments(command, " " * 20, positionals)
    yield " " * 20 + ";;"


def _zsh_arguments(command: Command, indent: str, more: list[str]) -> Iterator[str]:
    specs = [spec for option in command.options if option.flags for spec in _zsh_option(option)]
    yield f"{indent}_arguments -C \\"
    for spec in [*specs, *more][:-1]:
        yield f"{indent}    {spec} \\"
    yield f"{indent}    {[*specs, *more][-1]}"


def _zsh_option(option: Option) -> Iterator[str]:
    others = " ".join(option.flags)
    for flag in option.flags:
        first = "*" if option.repeats else f"({others})"
        value = f":value:{_zsh_action(option)}" if option.takes_value else ""
        yield _quoted(f"{first}{flag}[{_brackets(option.text)}]{value}")


def _zsh_action(option: Option) -> str:
    if option.choices:
        return f"({' '.join(option.choices)})"
    return "_files" if option.is_file else " "


def _colons(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:")


def _brackets(text: str) -> str:
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")


# -- fish ------------------------------------------------------------------------------------------


def _fish(found: list[Command]) -> list[str]:
    program, *rest = found
    lines = ["# fish completion for llorch; made by: llorch completion fish", "complete -c llorch -f"]
    for command in rest:
        text = _fish_quoted(command.text)
        lines.append(f"complete -c llorch -n __fish_use_subcommand -a {command.name} -d {text}")
    lines += [_fish_option("__fish_use_subcommand", option) for option in program.options]
    for command in rest:
        condition = _fish_quoted(f"__fish_seen_subcommand_from {command.name}")
        lines += [_fish_option(condition, option) for option in command.options]
    return [line for line in lines if line]


def _fish_option(condition: str, option: Option) -> str:
    names = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
    choices = f" -a {_fish_quoted(' '.join(option.choices))}" if option.choices else ""
    if not names and not choices and not option.is_file:
        return ""  # free text
    files = " -F" if option.is_file else ""
    required = "" if not (option.takes_value and names) else " -r" if option.is_file else " -x"
    named = "".join(f" {name}" for name in names)
    return (
        f"complete -c llorch -n {condition}{named}{required}{files}{choices} -d {_fish_quoted(option.text)}"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

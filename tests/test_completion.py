"""Completion in bash, zsh and fish: made from the parser, and true to it in the shells themselves."""

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from llorch import cli
from llorch.arguments import SHELLS
from llorch.completion import commands, script

PARSER = cli._parser()
COMMANDS = {command.name: command for command in commands(PARSER)}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    """Each shell that is installed."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; it must succeed and complain about nothing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def bash(tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    (tmp_path / "completion").write_text(script(PARSER, "bash"))
    array = " ".join(f"'{word}'" for word in words)
    code = f"source {tmp_path}/completion; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _llorch"
    return run("bash", "--norc", "-c", f'{code}; printf "%s\\n" "${{COMPREPLY[@]}}"', cwd=tmp_path).split(
        "\n"
    )[:-1]


def fish(tmp_path: Path, line: str) -> list[str]:
    """What fish offers at the end of this line."""
    (tmp_path / "completion.fish").write_text(script(PARSER, "fish"))
    code = f"source {tmp_path}/completion.fish; complete -C '{line}'"
    said = run("env", f"HOME={tmp_path}", "fish", "--no-config", "-c", code, cwd=tmp_path)
    return [offer.partition("\t")[0] for offer in said.splitlines()]


def test_the_shell_can_read_its_script(shell: str, tmp_path: Path) -> None:
    """`-n` finds no fault in it."""
    path = tmp_path / "completion"
    path.write_text(script(PARSER, shell))
    assert run(shell, "-n", str(path)) == ""


@pytest.mark.parametrize("shell_name", SHELLS)
def test_every_command_and_option_is_in_the_script(shell_name: str) -> None:
    """In each shell's own spelling, with nothing forgotten."""
    text = script(PARSER, shell_name)
    for command in COMMANDS.values():
        assert command.name in text
        for flag in command.flags:
            spelled = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            assert (spelled if shell_name == "fish" else flag) in text, (command.name, flag)


def test_the_commands_are_those_of_the_parser() -> None:
    """The same names, the same options, the same texts."""
    (choices,) = [a.choices for a in PARSER._actions if isinstance(a, argparse._SubParsersAction)]
    assert ["", *choices] == list(COMMANDS)
    assert {flag for action in choices["run"]._actions for flag in action.option_strings} == set(
        COMMANDS["run"].flags
    )
    assert all(command.text for command in COMMANDS.values())


def test_a_new_option_is_completed_at_once() -> None:
    """So it can't go stale."""
    parser = argparse.ArgumentParser(prog="llorch", description="x")
    command = parser.add_subparsers().add_parser("dance", help="it's [a] dance: twice")
    command.add_argument("--with", choices=["you", "me"], help="who's it")
    for shell in SHELLS:
        text = script(parser, shell)
        assert "dance" in text
        assert "you me" in text


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ru",), ["run"]),
        (("c",), ["check-config", "cancel", "completion"]),
        (("--v",), ["--version"]),
        (("run", "--max"), ["--max-tokens"]),
        (("run", "hello", "--top"), ["--top-k", "--top-p"]),
        (("run", "--priority", ""), ["interactive", "batch"]),
        (("run", "--determinism", "=", "str"), ["strict"]),
        (("ps", "--state", "ca"), ["cancelled"]),
        (("completion", ""), ["bash", "zsh", "fish", "-h", "--help"]),
        (("run", "--file", "a "), ["a file"]),
        (("serve", "--config", "a"), ["a file"]),
        (("init", "a"), ["a file"]),
        (("run", "--seed", ""), []),
        (("stream", "x"), []),
    ],
)
def test_bash_offers_what_fits(words: tuple[str, ...], offered: list[str], tmp_path: Path) -> None:
    """Commands, options, choices, files; nothing where only the user knows."""
    (tmp_path / "a file").touch()
    assert [offer for offer in bash(tmp_path, "llorch", *words) if offer] == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("llorch ru", ["run"]),
        ("llorch run --max", ["--max-tokens"]),
        ("llorch run --priority ", ["batch", "interactive"]),
        ("llorch completion ", ["bash", "fish", "zsh"]),
        ("llorch run --file ", ["a file", "completion.fish"]),
        ("llorch run --seed ", []),
    ],
)
def test_fish_offers_what_fits(line: str, offered: list[str], tmp_path: Path) -> None:
    """As bash does."""
    (tmp_path / "a file").touch()
    assert sorted(fish(tmp_path, line)) == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [("ru", "run "), ("run --max", "run --max-tokens "), ("run --priority b", "run --priority batch ")],
)
def test_zsh_completes_on_tab(line: str, offered: str, tmp_path: Path) -> None:
    """In a zsh on a terminal of its own: the line that Tab makes."""
    (tmp_path / "_llorch").write_text(script(PARSER, "zsh"))
    code = f"""
        zmodload zsh/zpty
        zpty z 'zsh -f -i'
        zpty -w z "PS1=; fpath=({tmp_path} \\$fpath); autoload -U compinit; compinit -u -d {tmp_path}/dump"
        zpty -w z "show() {{ print -r -- \\"<\\$BUFFER>\\"; zle kill-buffer }}"
        zpty -w z "zle -N show; bindkey '^X' show; print rea''dy"
        zpty -r -m z line '*ready*'
        zpty -w -n z $'llorch {line}\\t\\x18'
        zpty -r -m z line '*<*>*'
        print -r -- "$line"
    """
    assert f"<llorch {offered}>" in run("zsh", "-f", "-c", code)


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`source <(llorch completion bash)`."""
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script(PARSER, "bash")

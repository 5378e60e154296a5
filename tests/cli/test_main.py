"""The commands: all are listed, each describes itself, and a misspelt one is recognized."""

from __future__ import annotations

import pytest

import lightning_sg
from lightning_sg.cli import main
from lightning_sg.cli.commands import COMMANDS, GROUPS


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_all_commands_are_listed_with_a_line_each(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert command.summary in line
    assert max(map(len, lines)) <= 100


def test_every_command_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert f"lightning-sg {lightning_sg.__version__} (lightning " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"), [("plann", "Did you mean 'plan'?"), ("fitt", "Did you mean 'fit'?"), ("xyz", "The commands are")]
)
def test_a_misspelt_command_is_recognized(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([given])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.run is not None])
def test_own_commands_describe_themselves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"usage: lightning-sg {name} ")
    assert len(said.split("\n\n")[1].split()) > 10  # a description

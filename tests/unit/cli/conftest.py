"""Commands of `afd`, called in this process."""

import pytest

from afd.cli.main import main


@pytest.fixture
def run_plan(capsys):
    """`afd plan` with these arguments -> exit code, standard output, standard error."""

    def run_command(*arguments):
        code = main(["plan", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command

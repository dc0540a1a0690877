"""The README's Python example runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.slow
def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) <= 15
    exec(compile(block, "README.md", "exec"), {})
    fbp, prior = (float(x) for x in re.findall(r": (\d+) HU", capsys.readouterr().out))
    assert prior < fbp / 2.5  # 8 dB


def test_every_command_that_the_readme_names_exists() -> None:
    from typer.main import get_command

    from recon_cli.app import app

    known = set(get_command(app).commands)
    named = set(re.findall(r"`?recon ([a-z]+)", README.read_text()))
    assert named
    assert named <= known

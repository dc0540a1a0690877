"""The documentation: its code runs, its commands parse, its links and names exist."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from inverse.posterior import METHODS
from recon_cli.app import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"README.md": "test_readme.py", "measurement-file.md": "test_raw_formats.py"}
"""Pages whose blocks another test runs already."""

# typer carries its own copy of click in some versions
REFUSED = (typer.BadParameter.__mro__[2], AssertionError)

FENCE = re.compile(
    r"(?:<!-- no-run:([^>]*)-->\s*)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAME = re.compile(r"\b(?:inverse|phantoms)(?:\.\w+)+")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why it is not run."""

    language: str
    text: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    return [
        Block(language, body, reason.strip() or None)
        for reason, language, body in FENCE.findall(text)
    ]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def inline(text: str) -> list[str]:
    """Code between single backticks, which may run over the end of a line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> Iterator[list[str]]:
    """Words after ``recon`` in every line of shell blocks."""
    for block in blocks(text):
        if block.language in ("sh", ""):
            for line in re.sub(r"\\\n", " ", block.text).splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["recon"]:
                    yield words[1:]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the other words."""
    command: Any = get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no command 'recon {' '.join(words)}'"
        command = command.commands[rest.pop(0)]
    return command, rest


def parse(words: list[str]) -> None:
    """Options, values and arguments are what the command takes; nothing runs."""
    command, rest = find_command(words)
    if rest == ["--help"]:
        return
    assert not hasattr(command, "commands"), f"'recon {' '.join(words)}' names only a group"
    chosen = command.make_context("recon", rest).params
    if "samples" in chosen and "method" in chosen:
        assert chosen["method"] in METHODS, f"no method '{chosen['method']}'"
        options = {pair.partition("=")[0] for pair in chosen.get("option") or ()}
        assert options <= set(METHODS[chosen["method"]].options), f"no options {options}"


def parse_mention(words: list[str]) -> None:
    """A command in the text may lack arguments, but each option must exist."""
    command, rest = find_command(words)
    known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    named = {word.split("=")[0] for word in rest if word.startswith("-")}
    assert named <= known, f"no option {sorted(named - known)} of 'recon {' '.join(words)}'"


@functools.cache
def resolve(name: str) -> None:
    """Import the longest module, then follow attributes and annotated fields."""
    module, *parts = name.split(".")
    target: Any = importlib.import_module(module)
    for part in parts:
        module = f"{module}.{part}"
        if hasattr(target, part):
            target = getattr(target, part)
        elif part in getattr(target, "__annotations__", {}):
            target = None  # a field has no value without an instance
        else:
            try:
                target = importlib.import_module(module)
            except ModuleNotFoundError:
                raise AssertionError(f"'{name}' does not exist: no '{part}'") from None


def anchors(text: str) -> set[str]:
    """Fragments of headings as the usual hosts make them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_link(page: Path, link: str) -> None:
    if re.match(r"[a-z]+:", link):
        return
    path, _, fragment = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), f"{page.name}: no '{link}'"
    assert not fragment or fragment in anchors(target.read_text()), f"{page.name}: no '{link}'"


def each_page(function: Any) -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)(function)


def runs(page: Path) -> bool:
    python = [b for b in blocks(page.read_text()) if b.language == "python"]
    return page.name not in ELSEWHERE and bool(python)


@pytest.mark.parametrize("page", [p for p in PAGES if runs(p)], ids=lambda p: p.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace a page; a comment ``no-run: reason`` before one skips it."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    text = page.read_text()
    python = [block for block in blocks(text) if block.language == "python"]
    if all(block.reason for block in python):
        pytest.skip("; ".join(str(block.reason) for block in python))
    for block in python:
        # line numbers of the page, so that a traceback points into it
        lines = text[: text.index(block.text)].count("\n")
        code = compile("\n" * lines + block.text, str(page), "exec")
        if block.reason is None:
            exec(code, namespace)


@each_page
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for words in commands(text):
        for name in (w for w in words if w.endswith(".toml")):
            Path(name).touch()  # read as soon as it is parsed
        parse(words)
    for code in inline(text):
        if re.match(r"recon( |$)", code):
            parse_mention(shlex.split(code)[1:])


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page.read_text())):
        check_link(page, link)


@each_page
def test_names_resolve(page: Path) -> None:
    text = page.read_text()
    modules = [w for b in blocks(text) if b.language in ("sh", "") for w in NAME.findall(b.text)]
    for code in [*inline(text), *modules]:
        for name in NAME.findall(code):
            resolve(name)


def test_equations_are_numbered_in_order() -> None:
    text = (ROOT / "docs" / "theory.md").read_text()
    tags = [int(k) for k in re.findall(r"\\tag\{(\d+)\}", text)]
    assert tags == list(range(1, len(tags) + 1))
    cited = {int(k) for k in re.findall(r"(?<![\w\\}^)])\((\d+)\)", prose(text))}
    assert cited
    assert cited <= set(tags)


CITED = re.compile(r"docs/theory\.md, equations? ((?:\(\d+\)(?:, | and | to )?)+)")


def cited_equations(text: str) -> set[int]:
    """Numbers of the equations of theory.md that a source cites."""
    flat = " ".join(text.split())
    return {int(k) for found in CITED.findall(flat) for k in re.findall(r"\((\d+)\)", found)}


def test_equations_that_docstrings_cite_exist() -> None:
    tags = set(map(int, re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs/theory.md").read_text())))
    cited: set[int] = set()
    for package in ("inverse", "phantoms", "recon_cli"):
        for path in (ROOT / package).rglob("*.py"):
            found = cited_equations(path.read_text())
            assert found <= tags, f"{path.name} cites {sorted(found - tags)} of docs/theory.md"
            cited |= found
    assert cited
    assert cited_equations("see docs/theory.md, equations (3)\n    and (71)") == {3, 71}


def test_the_index_lists_every_page() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= listed, f"docs/index.md lacks {sorted(pages - listed)}"


def test_what_the_checks_refuse() -> None:
    page = (
        "# A title\n`recon study ct IN\n--views 9`\n\n<!-- no-run: needs data -->\n"
        "```python\nraise\n```\n"
        "```sh\nmake x  # recon no\nrecon demo -o out \\\n  --slices 2\n```\n"
    )
    assert [(b.language, b.reason) for b in blocks(page)] == [
        ("python", "needs data"),
        ("sh", None),
    ]
    assert list(commands(page)) == [["demo", "-o", "out", "--slices", "2"]]
    assert inline(page) == ["recon study ct IN --views 9"]
    for words in commands(page):
        parse(words)
    refused = (
        "demo --slice 2",
        "demo --slices many",
        "reconstruct scan.h5",
        "study",
        "reconstruct scan.h5 -o out --method none",
        "reconstruct scan.h5 -o out --method dds --option zeta=1",
    )
    for line in refused:
        with pytest.raises(REFUSED):
            parse(line.split())
    for line in ("denoise", "study pet", "demo --slice 2"):
        with pytest.raises(AssertionError):
            parse_mention(line.split())
    resolve("inverse.Measurement.data")
    for name in ("inverse.sde.SDE.beta", "inverse.nothing", "phantoms.thorax.nothing"):
        with pytest.raises(AssertionError):
            resolve(name)
    for link in ("nowhere.md", "README.md#no-such-heading", "#nor-this"):
        with pytest.raises(AssertionError):
            check_link(README, link)
    check_link(README, "README.md#in-python")

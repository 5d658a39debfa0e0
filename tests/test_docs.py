"""The documentation: every link leads somewhere, every page has its place, every command of a block exists.

Each line of a ```bash block is checked: `make` expands it with programs that print what they get; then its program, options,
config keys and configs must exist. A block that cannot be checked has `<!-- test: no, reason -->` before it; one with
`<!-- test: run -->` is run on painted photos (slow).
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from conftest import ROOT, env_without_make, run_program
from PIL import Image

from runtime.config import load_config
from runtime.errors import UserError
from tools.site import CODE, PAGES, links, of_site, repository_path

SOURCES = [*PAGES, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
WITH_COMMANDS = [s for s in SOURCES if s in ("README.md", "CONTRIBUTING.md", "docs/quickstart.md") or "/howto/" in s]
BLOCK = re.compile(r"(?:<!-- test: ([^>]*?) -->\s*)?^ *```bash\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
KEY = re.compile(r"[a-z_]+(\.\w+)*=.*", re.DOTALL)
SHELL = ("export", "cp", "cd", "sbatch")  # commands that need no check
PASSED_ON = {"tools.pretrain": "train.py", "tools.slurm": "train.py"}  # what they do not know is that program's


def text_of(source: str) -> str:
    return (ROOT / source).read_text()


# -------------------------------------------------------------------------------------------------------------- pages


@cache
def headings(source: str) -> list[str]:
    """The anchors of a page, as GitHub makes them."""
    found: list[str] = []
    for title in re.findall(
        r"^#+ +(.*)", re.sub(r"^ *```.*?^ *```", "", text_of(source), flags=re.S | re.M), re.MULTILINE
    ):
        title = re.sub(r"\]\([^)]*\)", "", title)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_every_link_leads_to_a_file_and_a_heading(source):
    for link in links(text_of(source)):
        if re.match(r"\w+:", link):
            continue
        target = repository_path(source, link) or source
        assert (ROOT / target).is_file(), link
        if "#" in link and target.endswith(".md"):
            assert link.partition("#")[2] in headings(target), link


def test_every_page_has_one_place_on_the_site():
    class Loader(yaml.SafeLoader):
        """Without what a tag would import."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)

    def pages(tree) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        return [page for part in (tree.values() if isinstance(tree, dict) else tree) for page in pages(part)]

    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert sorted(pages(config["nav"])) == sorted(of_site(source) for source in SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_lists_look_the_same_on_github_and_on_the_site(source):
    """The site's Markdown begins a list only after an empty line, and nests by four blanks."""
    lines = CODE.sub(lambda code: re.sub(r"[^\n]", "x", code[0]), text_of(source)).split("\n")
    for before, line in itertools.pairwise(lines):
        if re.match(r" *(-|1\.) ", line):
            assert not before.strip() or re.match(r" *(-|\d+\.) |  ", before), (
                f"an empty line is missing before: {line}"
            )
            assert (len(line) - len(line.lstrip())) % 4 == 0, f"nest by four blanks: {line}"


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    mkdocs = ROOT / ".venv-docs/bin/mkdocs"
    if not mkdocs.exists():
        pytest.skip("no .venv-docs: `make docs` makes it")
    command = [mkdocs, "build", "--site-dir", tmp_path]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / of_site(source)).with_suffix(".html").is_file() for source in SOURCES)


# ----------------------------------------------------------------------------------------------------------- commands


class Block(NamedTuple):
    source: str
    mark: str  # "run", "no, reason" or ""
    lines: list[list[str]]  # words of each command


def blocks(source: str) -> list[Block]:
    found = []
    for mark, code in BLOCK.findall(text_of(source)):
        lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").split("\n")]
        found.append(Block(source, mark, [line for line in lines if line]))
    return found


BLOCKS = [block for source in WITH_COMMANDS for block in blocks(source)]
CHECKED = [block for block in BLOCKS if not block.mark.startswith("no")]


def clone(folder: Path, python: str) -> Path:
    """The repository as `make` sees it, in another folder; `python`: the script that programs are started with."""
    folder.mkdir()
    shutil.copytree(ROOT / "configs", folder / "configs")  # a command may write there
    for name in ("eval", "model", "pipeline", "runtime", "tools", "train.py", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(python)
    (folder / ".venv/bin/python").chmod(0o755)
    (folder / ".venv/.ready").write_text("cpu\n")
    os.utime(folder / "requirements.lock", (0, 0))  # older than .venv
    return folder


@pytest.fixture(scope="module")
def echo(tmp_path_factory) -> Path:
    """Its programs print their words and do nothing."""
    make_words = f'if [ "$2" = tools.make_words ]; then exec "{sys.executable}" "$@"; fi'
    return clone(tmp_path_factory.mktemp("echo") / "clone", f'#!/bin/sh\n{make_words}\nprintf "%s\\0" program "$@"\n')


def without_placeholders(words: list[str]) -> list[str]:
    """The words without what a reader has to fill in: `CONFIG`, `…`, `[optional]`."""
    words = shlex.split(re.sub(r"\[(options|…)\]", "", shlex.join(words)).replace("''", ""))
    line = [word.removesuffix("]") if word.count("]") > word.count("[") else word.removeprefix("[") for word in words]
    line = [
        re.sub(r"^CONFIG(=…)?$", lambda m: "CONFIG=configs/demo.yaml" if m[1] else "configs/demo.yaml", w) for w in line
    ]
    return [word for word in line if word != "…"]


def programs_of(words: list[str], echo: Path) -> list[list[str]]:
    """The command lines of Python that a line starts."""
    words = without_placeholders(words)
    if words[0] == "make":
        if words[1:2] in (["setup"], ["docs"]):
            words.insert(1, "-n")
        done = subprocess.run(words, cwd=echo, env=env_without_make(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return [] if "-n" in words else [one.split("\0")[:-1] for one in done.stdout.split("program\0")[1:]]
    if words[0] == "torchrun":
        rest = words[next(i for i, word in enumerate(words) if not word.startswith("--") and i) :]
        return [rest]
    if re.fullmatch(r"(\.venv/bin/)?python3?", words[0]):
        return [words[1:]]
    if "=" in words[0]:  # a variable of the environment
        return programs_of(words[1:], echo)
    if words[0] == "pip":
        return [["-m", *words]]
    assert words[0] in SHELL, f"{words[0]}: not a command of this project; mark the block `<!-- test: no, reason -->`"
    return []


@cache
def help_of(program: str, command: str) -> str:
    words = (program,) if program.endswith(".py") else ("-m", program)
    return run_program(*words, *([command] if command else []), "--help").stdout


def check_program(words: list[str]) -> None:
    """The program, its options, config keys and configs exist."""
    program, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if program == "pip":
        extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
        named = {name for word in rest for found in re.findall(r"\.\[(.*)\]", word) for name in found.split(",")}
        assert named <= {*extras}, f"no such extra: {named - {*extras}}"
        return
    if program in ("pytest", "ruff", "mypy"):
        return
    path = ROOT / program.replace(".", "/") if words[0] == "-m" else ROOT / program
    assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), program
    command = rest[0] if rest and re.fullmatch(r"[a-z]\w+", rest[0]) and program != "train.py" else ""
    known = help_of(program, command) + (help_of(PASSED_ON[program], "") if program in PASSED_ON else "")
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    assert [o for o in options if not re.search(rf"(?<![\w-]){o}(?![\w-])", known)] == [], f"{program} {command}"
    configs = [word for word in rest if word.startswith("configs/") and rest[rest.index(word) - 1] != "--write"]
    assert all((ROOT / config).is_file() for config in configs), configs
    if program == "train.py" or program in PASSED_ON:
        of_sbatch = {rest[i + 1] for i, word in enumerate(rest) if word == "--option"}
        keys = [w for w in rest if KEY.fullmatch(w) and "…" not in w and w not in of_sbatch]
        allowed = [rest[i + 1] for i, word in enumerate(rest) if word == "--allow-change"]
        load_config(ROOT / (configs[0] if configs else "configs/demo.yaml"), keys, allowed=allowed)


def check_line(words: list[str], echo: Path) -> None:
    for program in programs_of(words, echo):
        check_program(program)


@pytest.mark.parametrize("source", WITH_COMMANDS)
def test_every_command_exists(source, echo):
    for block in blocks(source):
        if block.mark.startswith("no"):
            assert re.fullmatch(r"no, .{8,}", block.mark), f"{source}: say why: {block.mark}"
            continue
        assert block.mark in ("", "run"), block.mark
        for line in block.lines:
            try:
                check_line(line, echo)
            except (AssertionError, UserError) as error:
                raise AssertionError(f"{source}: {shlex.join(line)}: {error}") from error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make shard SRC=a DST=b", "no such target"),
        ("make shards SCR=a DST=b", "SRC"),
        ("make shards SRC=a DST=b ARGS='--resize 256'", "--resize"),
        ("make pretrain SHARDS=a ARGS=optim.epoch=3", "optim.epochs"),
        ("make pretrain CONFIG=configs/none.yaml SHARDS=a", "configs/none.yaml"),
        ("python -m tools.nothing", "tools.nothing"),
        ("python -m eval knn runs/mine --untrain", "--untrain"),
        ("pip install -e '.[remot]'", "remot"),
        ("aws s3 sync a b", "mark the block"),
    ],
)
def test_a_command_that_does_not_exist_is_found(echo, line, message):
    with pytest.raises((AssertionError, UserError), match=re.escape(message)):
        check_line(shlex.split(line), echo)


def paint(folder: Path, photos: int = 12) -> None:
    rng = np.random.default_rng(0)
    for n in range(photos):
        path = folder / ("cats", "dogs")[n % 2] / f"{n:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((80, 64)).save(path)


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted({block.source for block in BLOCKS if block.mark == "run"}))
def test_commands_that_take_seconds_run(source, tmp_path):
    """Block after block, in the order of the page, each line into folders that are not there yet."""
    folder = clone(tmp_path / "clone", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name in ("photos", "phone", "data/more", "more", "camera"):
        paint(folder / name)
    for name, kind in (("camera", "zip"), ("more", "gztar")):
        shutil.make_archive(str(folder / name), kind, folder / name)
        shutil.rmtree(folder / name)
    shutil.move(folder / "data/more", folder / "zipped")
    shutil.make_archive(str(folder / "data/one"), "zip", folder / "zipped")
    rows = [f"{kind}/{n:03d}.jpg,{kind}" for n, kind in enumerate(("cats", "dogs") * 6)]
    for name, first in (("chosen.csv", ""), ("labels.csv", ""), ("photos.csv", "photos/")):
        (folder / name).write_text("path,label\n" + "".join(f"{first}{row}\n" for row in rows))
    shards = ["-m", "tools.make_shards", "make", str(folder / "photos"), str(folder / "data/mine")]
    run_program(*shards, "--processes", "1")
    (folder / "synset_words.txt").write_text("cats the cats\ndogs the dogs\n")
    env = env_without_make() | {"OMP_NUM_THREADS": "1"}
    for block in blocks(source):
        for words in block.lines if block.mark == "run" else ():
            made = next((folder / w[4:] for w in words if w.startswith("DST=") and words[1] == "shards"), None)
            if made:
                shutil.rmtree(made, ignore_errors=True)
            done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
            assert not made or json.loads((made / "manifest.json").read_text())["samples"]

"""Dockerfiles, read as Docker reads them, and their steps followed without Docker."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from dockerfile_parse import DockerfileParser

#: What makes the system of an image: followed by nobody but Docker, and looked at by name.
SYSTEM = {"apt-get", "groupadd", "useradd", "install", "rm"}
# Folders of an image that steps name; those of a stage are made below a folder of its own.
_PLACES = re.compile(r"(?<![\w./-])/(src|wheels|usr/local/hvp|usr/local/bin|var/lib/hvp)(?![\w-])")


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction of a Dockerfile, with its words as they are written."""

    instruction: str
    value: str

    @property
    def words(self) -> list[str]:
        """The words of the value, options among them."""
        return shlex.split(self.value)


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a Dockerfile: what it goes on from, and its steps."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        """Values of all steps with an instruction."""
        return [step.value for step in self.steps if step.instruction == instruction]


def read_stages(path: Path) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, in their order."""
    with path.open("rb") as file:
        structure = DockerfileParser(fileobj=file, env_replace=False).structure
    stages: dict[str, Stage] = {}
    for each in structure:
        instruction, value = each["instruction"], each["value"]
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            assert name, f"a stage without a name: {value}"
            stages[name] = Stage(name=name, base=base)
        elif stages and instruction != "COMMENT":
            list(stages.values())[-1].steps.append(Step(instruction=instruction, value=value))
    return stages


@final
class Follower:
    """Follows the steps of stages with this machine's Python in the place of the base image's.

    Paths of the image lie below one folder, which stands for each stage in turn, so that programs
    that a stage copies from another one find themselves where they were made. What is downloaded
    of third parties is borrowed: the environments that steps make see the packages of this one,
    hvp's own left out, so that pip does all but fetch and unpack them, and refuses those of another
    version.

    Args:
        context: The folder that is copied from.
        stages: The stages, as `read_stages` gives them.
        folder: An empty folder.
    """

    def __init__(self, context: Path, stages: dict[str, Stage], folder: Path):
        self._context = context
        self._stages = stages
        self._folder = folder
        self._done: set[str] = set()
        self.root = folder / "image"  # a link to the stage that is looked at
        self._borrowed = borrow_packages(folder / "borrowed")
        self._python = folder / "python"
        self._python.mkdir()
        base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        (self._python / "python").symlink_to(base)

    def build(self, name: str) -> None:
        """Follow a stage and those before it, and look at it."""
        stage = self._stages[name]
        here = self._folder / f"stage-{name}"
        if name not in self._done:
            if stage.base in self._stages:
                self.build(stage.base)
                shutil.copytree(self._folder / f"stage-{stage.base}", here, symlinks=True)
            else:
                here.mkdir()
            for other in _copied_from(stage):
                self.build(other)
            self._look_at(here)
            for step in stage.steps:
                self._follow(step, name)
            self._done.add(name)
        self._look_at(here)

    def environment(self, name: str) -> dict[str, str]:
        """The variables that a stage sets, over those that a shell needs."""
        found = {"HOME": str(self._folder), "LANG": "C.UTF-8"}
        found["PATH"] = f"{self._python}:/usr/bin:/bin"
        for stage in self._line(name):
            for value in stage.values("ENV"):
                found |= dict(part.split("=", 1) for part in shlex.split(value))
        found["HOME"] = str(self._folder)
        if "/usr/local/hvp/bin" in found["PATH"]:
            found["PATH"] = self.place(found["PATH"])
        return {key: self.place(value) if key != "PATH" else value for key, value in found.items()}

    def place(self, text: str) -> str:
        """A text with the image's paths as they are on this machine."""
        return _PLACES.sub(lambda found: f"{self.root}/{found[1]}", text)

    def _line(self, name: str) -> list[Stage]:
        stage = self._stages[name]
        before = self._line(stage.base) if stage.base in self._stages else []
        return [*before, stage]

    def _look_at(self, here: Path) -> None:
        self.root.unlink(missing_ok=True)
        self.root.symlink_to(here)

    def _follow(self, step: Step, stage: str) -> None:
        if step.instruction == "COPY":
            self._copy(step.words)
        elif step.instruction == "RUN" and step.words[0] not in SYSTEM:
            for place in ("src", "usr/local/bin"):
                (self.root / place).mkdir(parents=True, exist_ok=True)
            arguments = {  # those with a default
                key: value
                for each in self._line(stage)
                for text in each.values("ARG")
                for key, found, value in [text.partition("=")]
                if found
            }
            answer = subprocess.run(
                ["sh", "-ec", self.place(step.value)],
                cwd=self.root / "src",
                env=self.environment(stage) | arguments,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert answer.returncode == 0, f"{step.value}\n{answer.stdout}\n{answer.stderr}"
            self._lend()

    def _copy(self, words: list[str]) -> None:
        options = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        to = self.root / ("src" if not target.startswith("/") else "") / target.lstrip("/")
        for source in sources:
            if other := options.get("from"):
                path = self._folder / f"stage-{other}" / source.lstrip("/")
            else:
                path = self._context / source
            if path.is_dir():
                shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True, ignore=_IGNORED)
                continue
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)
            if mode := options.get("chmod"):
                (to / path.name).chmod(int(mode, 8))

    def _lend(self) -> None:
        for packages in (self.root / "usr/local/hvp/lib").glob("python3*/site-packages"):
            (packages / "borrowed.pth").write_text(f"{self._borrowed}\n")


_IGNORED = shutil.ignore_patterns("__pycache__", "hvp_demo")


def _copied_from(stage: Stage) -> Iterator[str]:
    for value in stage.values("COPY"):
        for word in shlex.split(value):
            if word.startswith("--from="):
                yield word.removeprefix("--from=")


def borrow_packages(folder: Path) -> Path:
    """A folder with links to the packages of this environment but for hvp's own."""
    folder.mkdir()
    packages = Path(sysconfig.get_path("purelib"))
    for path in packages.iterdir():
        if not re.match(r"(_?hvp|_virtualenv|__editable__|__pycache__)|.*\.pth$", path.name):
            (folder / path.name).symlink_to(path)
    return folder

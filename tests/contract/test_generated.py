"""csi/pb is what the pinned grpcio-tools makes of proto/, and pyproject.toml asks for what csi/pb needs."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TOP = Path(__file__).resolve().parents[2]
PB = TOP / "csi" / "pb"
PROTOS = ("csi", "pluginregistration")
GENERATED = tuple(f"{proto}{kind}" for proto in PROTOS for kind in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"))


@pytest.fixture(scope="module")
def maker() -> str:
    """The version of grpcio-tools that made the committed code, installed here too; fails otherwise."""
    wanted = _written(r"GRPC_GENERATED_VERSION = '(\S+)'", "csi_pb2_grpc.py")
    try:
        found = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != wanted:
        pytest.fail(
            f"csi/pb can't be checked: it was made by grpcio-tools {wanted}, installed is {found}; "
            "run `pip install -e '.[dev]'`",
            pytrace=False,
        )
    return wanted


@pytest.fixture(scope="module")
def fresh(maker: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code made anew, by the same maker."""
    out = tmp_path_factory.mktemp("pb")
    argv = [
        sys.executable, "-m", "grpc_tools.protoc", f"-Icsi/pb={TOP / 'proto'}",
        f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}",
        *(f"csi/pb/{proto}.proto" for proto in PROTOS),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"grpcio-tools {maker} said: {done.stderr}"
    return out / "csi" / "pb"


@pytest.mark.parametrize("name", GENERATED)
def test_committed_code_is_what_the_maker_gives(fresh: Path, name: str) -> None:
    if (PB / name).read_bytes() != (fresh / name).read_bytes():
        pytest.fail(f"csi/pb/{name} is not what proto/ gives: run `make proto` and commit", pytrace=False)


def test_nothing_else_is_there() -> None:
    """A file that is left over from an older contract would be shipped."""
    names = {path.name for path in PB.iterdir() if path.is_file()}
    assert names == {*GENERATED, "__init__.py", "README.md"}


def test_pin_is_the_maker(maker: str) -> None:
    """`make proto` on a fresh checkout gives the same code again."""
    found = str(_requirement("grpcio-tools").specifier)
    assert found == f"=={maker}", f"pyproject.toml asks for grpcio-tools{found}, csi/pb was made by {maker}"


@pytest.mark.parametrize(
    ("package", "needed", "name"),
    [
        ("grpcio", r"GRPC_GENERATED_VERSION = '(\S+)'", "csi_pb2_grpc.py"),
        ("protobuf", r"Protobuf Python Version: (\S+)", "csi_pb2.py"),
    ],
)
def test_floor_is_high_enough(package: str, needed: str, name: str) -> None:
    """No version that pyproject.toml allows is refused by the generated code."""
    floors = [Version(part.version) for part in _requirement(package).specifier if part.operator == ">="]
    assert floors, f"pyproject.toml gives no lowest version of {package}"
    assert max(floors) >= Version(_written(needed, name))


def _written(pattern: str, name: str) -> str:
    """A version that the generated file `name` has in its text."""
    match = re.search(pattern, (PB / name).read_text())
    assert match, f"csi/pb/{name} has nothing like {pattern}"
    return match[1]


def _requirement(package: str) -> Requirement:
    found = [requirement for requirement in _requirements() if requirement.name == package]
    assert len(found) == 1, f"pyproject.toml names {package} {len(found)} times"
    return found[0]


def _requirements() -> Iterator[Requirement]:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        yield Requirement(text)

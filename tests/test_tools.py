"""The Go programs of the tests: what is said in two places must agree. Building them is for the tests that use them."""

import re
from pathlib import Path

import pytest

from tests.tools import build
from tests.tools.catalog import GROUP_OF, GROUPS, Group, Program, ToolError, pick_groups


@pytest.mark.parametrize("name", GROUPS)
def test_a_groups_programs_are_the_tools_of_its_go_mod(name: str) -> None:
    group = GROUPS[name]
    said = re.findall(r"^(?:tool |\t)([a-z]\S+)$", (group.folder / "go.mod").read_text(), re.M)
    own = {program.package for program in group.programs.values() if program.package.startswith("./")}
    assert {program.package for program in group.programs.values()} - own <= set(said)
    if len(group.programs) > 1:
        assert {program.package for program in group.programs.values()} == set(said)


@pytest.mark.parametrize("name", GROUPS)
def test_the_version_is_pinned_and_in_the_program(name: str) -> None:
    words = " ".join(build._arguments(GROUPS[name]))
    assert "{" not in words
    for program in GROUPS[name].programs.values():
        version = build._pinned_version(GROUPS[name], program)
        assert re.fullmatch(r"v\d+\.\d+\.\d+\S*", version)
        assert not program.variables or version in words


def test_names_are_programs_or_groups() -> None:
    assert pick_groups(["kubelet", "nomad", "csi-provisioner"]) == ["kubernetes", "nomad"]
    assert pick_groups([]) == list(GROUPS)
    with pytest.raises(ToolError, match=r"no test tool is called 'etcd'; there are: .*kubelet"):
        pick_groups(["etcd"])
    assert len(GROUP_OF) == sum(len(group.programs) for group in GROUPS.values())


def test_a_build_that_fails_says_what_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CACHE", tmp_path)
    group = Group({"x": Program("./no-such-folder", "github.com/container-storage-interface/spec")}, "never")
    monkeypatch.setitem(GROUPS, "x", group)
    monkeypatch.setitem(GROUP_OF, "x", "x")
    with pytest.raises(ToolError, match=r"x can't be built: `.*go build .*` said\n(.|\n)*no-such-folder"):
        build.tool_path("x")
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]

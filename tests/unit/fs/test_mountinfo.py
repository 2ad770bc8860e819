from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import Unavailable
from csi.fs.mountinfo import Mount, layers_at, origin_of, parse, read_table

TABLE = rb"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,size=10k
40 27 8:16 / /k/staging rw,nosuid,nodev shared:7 master:3 - ext4 /dev/sdb rw
41 27 8:16 / /k/pods/a\040b\011c\012d\134e\043 ro,nosuid shared:7 - ext4 /dev/sdb rw
42 27 0:6 /sdc /k/pods/block rw - devtmpfs devtmpfs rw,size=10k
43 40 8:32 / /k/staging rw - xfs /dev/sdc ro,nouuid
44 27 8:48 / /k/gone//deleted rw - ext4 /dev/sdd rw
45 27 0:50 / /empty rw - tmpfs  rw
"""


def test_parse_reads_every_field_and_escape() -> None:
    mounts = parse(TABLE)
    assert mounts[2] == Mount(
        mount_id=40,
        parent_id=27,
        major_minor="8:16",
        root="/",
        mount_point=Path("/k/staging"),
        fs_type="ext4",
        options=frozenset({"rw", "nosuid", "nodev"}),
        super_options=frozenset({"rw"}),
        source="/dev/sdb",
    )
    assert mounts[3].mount_point == Path("/k/pods/a b\tc\nd\\e#")
    assert [mount.readonly for mount in mounts[2:6]] == [False, True, False, True]
    assert mounts[7].source == ""


def test_layers_come_lowest_first_whatever_the_order_of_the_table() -> None:
    mounts = parse(TABLE)
    for table in (mounts, list(reversed(mounts))):
        assert [mount.mount_id for mount in layers_at(table, Path("/k/staging"))] == [40, 43]
    assert layers_at(mounts, Path("/k/gone")) == []
    assert layers_at(mounts, Path("/k/gone/deleted")) == []


@pytest.mark.parametrize(
    ("path", "origin"),
    [
        ("/k/staging", ("8:32", "/")),
        ("/k/staging/sub/dir", ("8:32", "/sub/dir")),
        ("/dev/sdc", ("0:6", "/sdc")),
        ("/k/pods/block", ("0:6", "/sdc")),
        ("/k", ("254:0", "/k")),
        ("/", ("254:0", "/")),
    ],
)
def test_origin_follows_the_topmost_mount(path: str, origin: tuple[str, str]) -> None:
    assert origin_of(parse(TABLE), Path(path)) == origin


def test_origin_does_not_see_a_mount_that_is_covered() -> None:
    table = b"1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /a/b rw - ext4 b rw\n3 1 8:3 / /a rw - ext4 c rw\n"
    assert origin_of(parse(table), Path("/a/b")) == ("8:3", "/b")
    assert origin_of([], Path("/a")) is None


@pytest.mark.parametrize("line", [b"x", b"1 2 3:4 / / rw", b"a 2 3:4 / / rw - ext4 s rw", b"1 2 3:4 / / rw - ext4 s"])
def test_a_line_of_another_format_is_an_error_that_shows_it(line: bytes) -> None:
    with pytest.raises(Unavailable, match="can't understand the line"):
        parse(line + b"\n")


def test_a_missing_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="mount table"):
        read_table(tmp_path / "mountinfo")


def test_the_table_of_this_machine_can_be_read() -> None:
    mounts = read_table(Path("/proc/self/mountinfo"))
    assert any(mount.mount_point == Path("/proc") and mount.fs_type == "proc" for mount in mounts)
    assert origin_of(mounts, Path("/proc/self")) == (layers_at(mounts, Path("/proc"))[-1].major_minor, "/self")


def escape(text: bytes) -> bytes:
    for letter in b"\\ \t\n#":
        text = text.replace(bytes([letter]), b"\\%03o" % letter)
    return text


@given(
    st.binary(min_size=1, max_size=60).filter(lambda name: b"/" not in name and b"\0" not in name and name.strip(b".")),
    st.lists(st.sampled_from([b"shared:1", b"master:2", b"propagate_from:3", b"unbindable"])),
)
def test_any_path_survives(name: bytes, optional: list[bytes]) -> None:
    line = b" ".join([b"5 1 8:1 / /x/" + escape(name) + b" rw", *optional, b"- ext4", escape(name), b"rw"])
    (mount,) = parse(line)
    assert bytes(mount.mount_point) == b"/x/" + name
    assert mount.source.encode(errors="surrogateescape") == name


@given(st.binary(max_size=300))
def test_any_bytes_give_mounts_or_an_error_of_ours(data: bytes) -> None:
    try:
        mounts = parse(data)
    except Unavailable:
        return
    origin_of(mounts, Path("/a"))


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.sampled_from(["/", "/a", "/a/b"])), max_size=8))
def test_a_tangled_table_ends_no_look_in_a_loop(lines: list[tuple[int, int, str]]) -> None:
    mounts = parse("".join(f"{a} {b} 8:1 / {path} rw - ext4 s rw\n" for a, b, path in lines).encode())
    layers_at(mounts, Path("/a"))
    origin_of(mounts, Path("/a/b"))

"""The parts of the lab that work without a guest."""

import struct
from pathlib import Path

import pytest

from . import LabError, apt, disk, kernel, packages, scratch, tcp_reset

STANZA = """# where it comes from
Types: deb deb-src
# an old place
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main
"""


def test_source_is_the_machines_own_place(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(STANZA)
    name, text = apt.find_source("sid", tmp_path, "bookworm")
    assert name == "sid.sources"
    assert text == (
        "Types: deb\nUris: http://mirror.example/debian\nSuites: sid\nComponents: main\n"
        "Signed-by: -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    )


@pytest.mark.parametrize("options", ["", "[signed-by=/k.gpg arch=amd64] "])
def test_source_from_a_one_line_list(tmp_path: Path, options: str) -> None:
    lines = ["# deb http://no.example sid main", "deb-src http://x.example trixie main"]
    lines.append(f"deb {options}http://m.example/debian trixie main")
    (tmp_path / "sources.list").write_text("\n".join(lines))
    found = apt.find_source("sid", tmp_path, "trixie")
    assert found == ("sid.list", f"deb {options}http://m.example/debian sid main\n")


def test_machine_without_debian_sources_is_told(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://m.example/ubuntu noble main\n")
    with pytest.raises(LabError, match="no Debian source"):
        apt.find_source("sid", tmp_path, "noble-not")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "NEEDED", {"tgt": "no-such-tgtd", "lvm2": "/no/such/lvm", "util-linux": "sh"})
    with pytest.raises(LabError, match="apt-get install lvm2 tgt"):
        packages.check_host()


def test_kernel_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    own = kernel.Kernel(Path("/own"), Path("/modules"), "6.1", seccomp=False)

    def fail(cache: Path) -> kernel.Kernel:
        raise LabError("no way to sid")

    monkeypatch.delenv("SNODE_LAB_KERNEL", raising=False)
    monkeypatch.setattr(kernel, "_sid_kernel", fail)
    monkeypatch.setattr(kernel, "_probe", lambda binary, modules: own)
    assert kernel.get_kernel() == own
    assert "no way to sid" in capsys.readouterr().err
    monkeypatch.setenv("SNODE_LAB_KERNEL", "sid")
    with pytest.raises(LabError, match="no way to sid"):
        kernel.get_kernel()


def test_no_kernel_at_all_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SNODE_LAB_KERNEL", "debian")
    monkeypatch.setattr(kernel, "_DEBIAN_OWN", (tmp_path / "linux.uml", tmp_path))
    with pytest.raises(LabError, match="apt-get install user-mode-linux"):
        kernel.get_kernel()


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("1K", 1024), ("3m", 3 << 20), ("4G", 4 << 30), ("1T", 1 << 40)]
)
def test_disk_sizes(text: str, size: int) -> None:
    assert disk.size_of(text) == size


def test_disk_is_sparse_and_never_overwritten(tmp_path: Path) -> None:
    made = disk.Disk("1G")
    made.create(tmp_path / "image", 1)
    assert made.argument == f"ubdb={tmp_path}/image"
    assert (tmp_path / "image").stat().st_size == 1 << 30
    assert (tmp_path / "image").stat().st_blocks == 0
    with pytest.raises(FileExistsError):
        disk.Disk("1G").create(tmp_path / "image", 1)


def test_scratch_base_of_a_stranger_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNODE_LAB_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError):
        scratch.base_folder()
    tmp_path.chmod(0o700)
    assert scratch.base_folder() == tmp_path


def test_forged_resets_name_what_each_end_expects() -> None:
    one, two = b"\x0a\x63\x00\x01", b"\x0a\x63\x00\x02"
    tcp = struct.pack("!HHIIBBHHH", 40000, 3260, 1000, 2000, 5 << 4, 16 | 8, 500, 0, 0) + b"x" * 48
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + one + two
    seen = tcp_reset.parse(b"\x02" * 6 + b"\x01" * 6 + b"\x08\x00" + ip + tcp)
    assert seen is not None
    assert (seen.source, seen.target, seen.end, seen.ack) == ((one, 40000), (two, 3260), 1048, 2000)
    to_target, to_source = (tcp_reset.parse(frame) for frame in tcp_reset.forge(seen))
    assert to_target is not None
    assert to_source is not None
    assert (to_target.source, to_target.end, to_target.macs[0]) == ((one, 40000), 1048, b"\x02" * 6)
    assert (to_source.source, to_source.end, to_source.macs[0]) == ((two, 3260), 2000, b"\x01" * 6)
    assert tcp_reset.parse(b"\x00" * 60) is None

"""Claims of one process, against a second one and against folders that are not ours alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from csi.claims import claim_state_folder, claim_tgtd, folder_problem
from csi.errors import Unavailable


def test_the_state_folder_is_for_one_process_of_a_role(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    claim_state_folder(folder, ["controller"])
    assert folder.stat().st_mode & 0o777 == 0o700
    claim_state_folder(folder, ["node"])
    with pytest.raises(Unavailable, match="another controller works in this state folder"):
        claim_state_folder(folder, ["controller", "node"])


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(Unavailable, match=rf"can be written by others .*; chmod 0700 {tmp_path}"):
        claim_state_folder(tmp_path, ["controller"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(Unavailable, match=r"belongs to user 65534, not to root; chown 0"):
        claim_state_folder(tmp_path, ["controller"])


def test_a_folder_that_others_only_read_is_accepted(tmp_path: Path) -> None:
    """The records in it have modes of their own, and what else is there may be for others."""
    tmp_path.chmod(0o755)
    (tmp_path / "something").touch()
    assert folder_problem(tmp_path, uid=0) == ("", "")
    claim_state_folder(tmp_path, ["controller"])
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_an_empty_folder_is_made_ours_alone(tmp_path: Path) -> None:
    """As Kubernetes makes a hostPath."""
    tmp_path.chmod(0o755)
    claim_state_folder(tmp_path, ["node"])
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_place_that_can_not_be_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="Not a directory"):
        claim_state_folder(tmp_path / "file" / "state", ["controller"])


def test_a_tgtd_is_for_one_controller(tmp_path: Path) -> None:
    """Two with state folders of their own removed each other's targets."""
    run, link = tmp_path / "run", tmp_path / "var"
    run.mkdir()
    link.symlink_to(run)
    claim_tgtd(run / "socket.0", folder=tmp_path)
    claim_tgtd(run / "socket.1", folder=tmp_path)
    with pytest.raises(Unavailable, match=r"another controller has the tgtd at .*/var/socket\.0"):
        claim_tgtd(link / "socket.0", folder=tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("snode-tgt-*.lock")} == {0o600}


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from csi.claims import *; claim_tgtd(Path('/x'), folder=Path('{tmp_path}'))"
    subprocess.run([sys.executable, "-c", code], check=True)
    claim_tgtd(Path("/x"), folder=tmp_path)


def test_a_folder_without_room_for_a_lock_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="can't be locked"):
        claim_tgtd(Path("/x"), folder=tmp_path / "absent")

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from csi.deadline import Deadline
from csi.errors import DriverError, Invalid, Unavailable
from csi.model import Chap, IscsiPath
from csi.run import step_name
from tests.fakes.iscsi import CHAP, FakeIscsi

V = "v-" + "a" * 26
OTHER = "v-" + "b" * 26
NEW = "00000000000000ff"


def test_connect_gives_the_verified_device_and_a_private_record(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    device = node.connector().connect(attachment, deadline)
    assert (device.path, device.major_minor) == (node.dev / "sda", "8:16")
    assert (device.size_bytes, device.generation) == (1 << 30, attachment.generation)
    (record,) = node.database.glob("nodes/*/*/default")
    assert record.stat().st_mode & 0o777 == 0o600
    text = record.read_text()
    for line in (
        "node.startup = manual",
        "node.session.scan = manual",
        "node.conn[0].startup = manual",
        "node.session.timeo.replacement_timeout = 120",
        "node.conn[0].timeo.login_timeout = 5",
        "node.session.initial_login_retry_max = 3",
        "node.session.nr_sessions = 1",
        "node.session.auth.authmethod = CHAP",
    ):
        assert text.count(line + "\n") == 1
        assert len(re.findall(re.escape(line.partition(" = ")[0]) + " = ", text)) == 1


def test_secrets_are_in_no_command_line(node: FakeIscsi, deadline: Deadline) -> None:
    node.connector().connect(node.publish(V), deadline)
    node.connector().disconnect(V, deadline)
    assert not any("SENTINEL" in word for call in node.runner.calls for word in call)


def test_connect_repeated_adopts(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    connector = node.connector()
    first = connector.connect(attachment, deadline)
    assert connector.connect(attachment, deadline) == first == node.connector().find(V)
    assert len(node.sessions) == 1 and node.runner.count("--login") == 1


def test_parallel_connects_of_one_volume_make_one_session(node: FakeIscsi, deadline: Deadline) -> None:
    attachment, connector = node.publish(V), node.connector()
    with ThreadPoolExecutor(8) as pool:
        devices = set(pool.map(lambda _: connector.connect(attachment, deadline), range(8)))
    assert len(devices) == 1 and len(node.sessions) == 1


def test_disconnect_leaves_nothing_and_may_be_repeated(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    connector.connect(node.publish(OTHER), deadline)
    connector.disconnect(V, deadline)
    connector.disconnect(V, deadline)
    assert connector.find(V) is None and connector.find(OTHER) is not None
    connector.disconnect(OTHER, deadline)
    assert node.leftovers() == []
    flushed = [call for call in node.runner.calls if step_name(call) == "flush_helper"]
    assert [call[4] for call in flushed] == [str(node.dev / "sda"), str(node.dev / "sdb")]


def test_find_takes_whole_names_only(node: FakeIscsi, deadline: Deadline) -> None:
    connector = node.connector()
    connector.connect(node.publish(V), deadline)
    assert connector.find(V[:-1]) is None
    assert connector.find(V + "a") is None


@pytest.mark.parametrize("code", [4, 6, 8, 9, 11, 18, 20, 28, 29, 32, 33, 19])
def test_login_is_repeated_for_codes_that_may_pass(node: FakeIscsi, deadline: Deadline, code: int) -> None:
    node.runner.fail("--login", reply=(code, "", ""))
    assert node.connector().connect(node.publish(V), deadline)
    assert node.runner.count("--login") == 2


@pytest.mark.parametrize("code", [1, 3, 5, 7, 10, 12, 13, 14, 16, 22, 23, 24, 31, 99])
def test_login_stops_at_codes_that_stay(node: FakeIscsi, deadline: Deadline, code: int) -> None:
    node.runner.fail("--login", reply=(code, "", ""))
    with pytest.raises(DriverError, match=f"{V}.*{code}"):
        node.connector().connect(node.publish(V), deadline)
    assert node.runner.count("--login") == 1
    assert node.leftovers() == []


def test_login_that_finds_a_session_is_judged_by_sysfs(node: FakeIscsi, deadline: Deadline) -> None:
    node.runner.fail("--login", after=True, reply=(15, "", ""))
    assert node.connector().connect(node.publish(V), deadline)


def test_login_reported_but_not_in_sysfs(node: FakeIscsi) -> None:
    node.runner.fail("--login", reply=(0, "", ""))
    with pytest.raises(Unavailable, match="kernel shows none"):
        node.connector().connect(node.publish(V), Deadline.after(1))


def test_login_that_fails_after_its_effect_is_adopted_at_the_repetition(node: FakeIscsi, deadline: Deadline) -> None:
    node.runner.fail("--login", after=True, reply=(5, "", ""))
    attachment, connector = node.publish(V), node.connector()
    with pytest.raises(Unavailable):
        connector.connect(attachment, deadline)
    assert connector.connect(attachment, deadline)
    assert len(node.sessions) == 1


def test_refused_target_is_tried_a_few_times_and_leaves_nothing(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.targets.clear()
    with pytest.raises(Unavailable, match="published to this node"):
        node.connector().connect(attachment, deadline)
    assert node.runner.count("--login") == 5
    assert node.leftovers() == []


def test_wrong_secret_is_refused_and_not_told(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    node.targets[attachment.paths[0].target].chap = dataclasses.replace(CHAP, mutual_secret="another")
    with pytest.raises(Unavailable, match="CHAP failed") as raised:
        node.connector().connect(attachment, deadline)
    assert "SENTINEL" not in str(raised.value)
    assert node.leftovers() == []


def test_secret_cannot_add_settings(node: FakeIscsi, deadline: Deadline) -> None:
    chap = Chap(user="u", secret="SENTINEL\nnode.startup = automatic", mutual_user="m", mutual_secret="x")
    with pytest.raises(Invalid) as raised:
        node.connector().connect(dataclasses.replace(node.publish(V), chap=chap), deadline)
    assert "SENTINEL" not in str(raised.value)
    assert node.leftovers() == []


def test_silent_portal_is_told_before_any_login(node: FakeIscsi) -> None:
    attachment = node.publish(V)
    node.close()
    with pytest.raises(Unavailable, match="does not answer"):
        node.connector().connect(attachment, Deadline.after(1.5))
    assert node.runner.calls == [] and node.leftovers() == []


@pytest.mark.parametrize(("seconds", "tries"), [(60, 3), (14, 2), (9, 1), (2, 1)])
def test_iscsid_tries_no_longer_than_the_request_lasts(node: FakeIscsi, seconds: int, tries: int) -> None:
    """It goes on whether anybody waits or not; what is kept back is for telling the caller."""
    node.connector().connect(node.publish(V), Deadline.after(seconds))
    (record,) = node.database.glob("nodes/*/*/default")
    assert f"node.session.initial_login_retry_max = {tries}\n" in record.read_text()


def test_second_portal_is_used_when_the_first_is_silent(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    path = attachment.paths[0]
    paths = (IscsiPath(path.target, "127.0.0.1:1", 1), path)
    assert node.connector().connect(dataclasses.replace(attachment, paths=paths), deadline)


def test_damaged_record_is_made_anew(node: FakeIscsi, deadline: Deadline) -> None:
    attachment = node.publish(V)
    record = node.database / "nodes" / attachment.paths[0].target / f"{node.portal.replace(':', ',')},1" / "default"
    record.parent.mkdir(parents=True)
    record.write_text("\n")
    assert node.connector().connect(attachment, deadline)
    assert "# END RECORD" in record.read_text()


@pytest.mark.parametrize("field", ["volume_id", "scsi_id", "paths", "lun"])
def test_context_of_another_volume_is_refused(node: FakeIscsi, deadline: Deadline, field: str) -> None:
    attachment = node.publish(V)
    changes: dict[str, dict[str, Any]] = {
        "volume_id": {"volume_id": OTHER},
        "scsi_id": {"scsi_id": ""},
        "paths": {"paths": ()},
        "lun": {"paths": (dataclasses.replace(attachment.paths[0], lun=0),)},
    }
    with pytest.raises(Invalid, match=r"publish_context\.paths of volume"):
        node.connector().connect(dataclasses.replace(attachment, **changes[field]), deadline)
    assert node.runner.calls == []

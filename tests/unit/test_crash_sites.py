"""Every place in the driver that changes the world is a moment of death in test_crash_points.py.

The source is read for these places (crash_sites.py), and the cases are run without a kill, to see which of them they
pass. So a new command, record or file that no case reaches is named here, and so is a change without a boundary.
"""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes.crash import Place
from tests.unit.crash_hidden import hidden
from tests.unit.crash_points import count
from tests.unit.crash_sites import ROOT, Source, driver
from tests.unit.test_crash_points import CASES

#: Lines of a new place.
NEW = (
    "self._devices.flush('sda', deadline)",
    "r = self._runner",
    "r.run(['dmsetup', 'remove', 'x'], deadline=deadline)",
    "go = self._runner.run",
    "go(['dmsetup', 'remove', 'x'], deadline=deadline)",
    "self._runner.run(['dmsetup', 'remove', 'x'], deadline=deadline, read_only=True)",
    "self._runner.run(argv, deadline=deadline, read_only=True)",
    "os.removedirs('/x')",
    "os.renames('/x', '/y')",
    "list(map(os.unlink, ['/x']))",
    "list(map(Path.unlink, ['/x']))",
    "threading.Thread(target=self._devices.flush)",
    "print('1', file=open('/x', 'a'))",
    "Path('/x').open(mode='w')",
)


@pytest.fixture(scope="module")
def visited(request: pytest.FixtureRequest) -> set[Place]:
    """The calls under way at the steps of all cases. Prints how many steps each request has."""
    places: set[Place] = set()
    steps: Counter[str] = Counter()
    for case in CASES:
        with case.ground() as ground:
            passed, _ = count(ground)
        places |= passed.places
        steps[case.request] += len(passed.names)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        each = ", ".join(f"{request} {number}" for request, number in sorted(steps.items()))
        print(f"\n{steps.total()} crash points in {len(CASES)} cases: {each}")
    return places


def test_every_change_has_boundaries_around_it() -> None:
    assert driver().unbounded() == []


def test_every_place_that_changes_anything_is_a_moment_of_death(visited: set[Place]) -> None:
    missed = driver().missed(visited)
    assert not missed, "no case passes:\n" + "\n".join(map(str, missed))


def test_nothing_is_hidden_from_the_reader() -> None:
    """And every command that is said to be read-only is one of a list."""
    assert hidden(driver()) == []


def test_a_new_place_shows(tmp_path: Path) -> None:
    edits = [
        ("connectors/logout.py", "        if not session.exists:\n", "".join(f"        {line}\n" for line in NEW)),
        ("connectors/devices.py", "_FLUSH = ", "from os import unlink\nfrom fcntl import ioctl\nimport os as system\n"),
        ("fs/grow.py", "    return found is not None and bool(", '    runner.run(["sync"], deadline=deadline)\n'),
        ("publishing.py", "        self._admission = threading.Lock()\n", "        publications.remove(publication)\n"),
        ("records.py", "            temporary.rename(path)\n", "            temporary.unlink()\n"),
        ("doctor.py", "            found = self._host.runner.run(", '            self._host.runner.run(["sync"])\n'),
    ]
    shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("pb", "__pycache__"))
    for file, place, new in edits:
        path = tmp_path / file
        text = path.read_text()
        assert text.count(place) == 1
        path.write_text(text.replace(place, new + place))
    changed = Source(tmp_path)
    old = {(site.file, site.function, site.text) for site in driver().missed(set())}
    missed = [site for site in changed.missed(set()) if (site.file, site.function, site.text) not in old]
    named = {str(site).partition(" in ")[2] for site in missed}
    assert named >= {
        "Logout.end: self._devices.flush('sda', deadline)",  # an old command at a new place
        "Logout.end: r.run(['dmsetup', 'remove', 'x'], deadline=deadline)",  # a runner by another name
        "may_grow_mounted_ext4: runner.run(['sync'], deadline=deadline)",  # a new command
        "Publishing.__init__: publications.remove(publication)",
    }
    unbounded = [text.partition(" in ")[2] for text in changed.unbounded() if "RecordStore" in text]
    assert unbounded == ["RecordStore.write: temporary.unlink()", "RecordStore.write: temporary.rename(path)"]
    unbounded = [text.partition(" in Logout.end: ")[2] for text in changed.unbounded() if "Logout.end" in text]
    assert unbounded == [
        "os.removedirs('/x')",
        "os.renames('/x', '/y')",
        "open('/x', 'a')",
        "Path('/x').open(mode='w')",
    ]
    assert [text.partition(": ")[2] for text in hidden(changed)] == [
        "from os import unlink",
        "from fcntl import ioctl",
        "os under another name",
        "Logout.end names without a call self._runner.run",
        "Logout.end runs as one that changes nothing: dmsetup remove x",
        "Logout.end runs as one that changes nothing: self._runner.run(argv, deadline=deadline, read_only=True)",
        "Logout.end names without a call os.unlink",
        "Logout.end names without a call Path.unlink",
        "Logout.end names without a call self._devices.flush",
        "_Doctor._module runs as one that changes nothing: sync",
    ]

"""Docker for real, on one machine: dockerd, its containers, and volumes in files."""

from collections.abc import Iterator

import pytest

from tests.lab import Lab, roles
from tests.lab.docker_host import IMAGE, DockerHost, add_docker_host

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def host() -> Iterator[DockerHost]:
    with Lab() as lab:
        made = DockerHost(add_docker_host(lab, "host"), "")
        lab.boot_all()
        made.boot_work()
        yield made


def test_a_volume_of_files_from_docker(host: DockerHost) -> None:
    docker = host.docker
    docker("volume create -d snode -o size=200M data")
    assert docker("volume ls --format '{{.Driver}} {{.Name}}'") == "snode data"
    assert '"size_bytes": 209715200' in docker("volume inspect data")
    for count in (1, 2):
        out = docker(f"run --rm --network none -v data:/data {IMAGE} sh -c 'date >> /data/dates; wc -l < /data/dates'")
        assert out == str(count)
    assert host.mounts() == []
    # The data volume container of old.
    docker(f"create --network none --name box -v data:/myvolume {IMAGE}")
    assert docker(f"run --rm --network none --volumes-from box {IMAGE} sh -c 'wc -l < /myvolume/dates'") == "2"
    code, out = host.guest.run("docker volume rm data")
    assert code and "volume is in use" in out
    docker("rm box")
    docker("volume rm data")
    assert host.guest.run("ls /var/lib/snode/volumes/*.img /var/lib/snode/docker/uses/*")[0] != 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-o size=lots", "option size: 'lots' is no size; write 1G, 500M or 1.5T"),
        ("-o siz=1G", "option 'siz' is unknown; did you mean size?"),
        ("-o pool=fast", "no pool 'fast' here; there is: default"),
        ("-o fs=ntfs", "'ntfs': supported are ext4, xfs, btrfs"),
        ("-o size=900G", "pool default"),
    ],
)
def test_a_wrong_option_is_told_to_dockers_user(host: DockerHost, options: str, words: str) -> None:
    code, out = host.guest.run(f"docker volume create -d snode {options} bad")
    assert code and words in out, out
    assert host.docker("volume ls -q") == ""


def test_uses_are_counted_over_all_restarts(host: DockerHost) -> None:
    docker, guest = host.docker, host.guest
    docker("volume create -d snode -o size=100M data")
    for name in ("one", "two"):
        docker(
            f"run -d --network none --name {name} -v data:/data {IMAGE} sh -c 'echo {name} >> /data/who; sleep 10000'"
        )
    docker("stop -t 0 one")
    assert len(host.mounts()) >= 2, "the second container still uses it"
    # The plugin dies and comes back: nothing of a container changes, and the last one detaches.
    assert host.driver is not None
    host.driver.kill9()
    assert docker("exec two cat /data/who") == "one\ntwo"
    host.start_driver()
    docker("start one")
    docker("stop -t 0 two")
    assert docker("exec one cat /data/who").splitlines()[-1] == "one"
    docker("stop -t 0 one")
    assert host.mounts() == []
    # Docker dies with its containers, and never says what ended.
    docker("start one")
    host.kill_dockerd()
    assert len(host.mounts()) >= 2
    host.start_dockerd()
    assert docker("ps -q") == ""
    docker("start two")
    docker("stop -t 0 two")
    roles.until(guest, "! grep -q /var/lib/snode/docker/ /proc/self/mountinfo", "the end of the mounts")
    # The machine loses its power.
    docker("start one")
    guest.sh("sync")
    guest.kill9()
    guest.boot()
    host.boot_work()
    docker("start two")
    assert docker("exec two sh -c 'wc -l < /data/who'") == "7"
    docker("stop -t 0 two")
    assert host.mounts() == []
    docker("rm one two")
    docker("volume rm data")

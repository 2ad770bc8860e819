"""CNODEs of two kinds, which do the same things: guests with a kernel, and sessions of libiscsi without."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

from csi import publish_context
from csi.model import Attachment, Chap, IscsiPath, NodeId, scsi_id_of
from csi.pb import csi_pb2 as pb
from csi.sealing import NodeKey
from tests.lab.cluster import MIB, Cluster, Machine, capability
from tests.lab.libiscsi import CHUNK, SECTOR, WRITE, IscsiError, Session
from tests.lab.network import Network

# What a guest writes: its volume has a filesystem on it too.
_FILE = 8 * MIB


@dataclass
class Guest:
    """A CNODE with a kernel: its volume is a filesystem in a container's path."""

    size_bytes: ClassVar[int] = 3 * _FILE

    machine: Machine
    cluster: Cluster
    volume_id: str = ""
    context: dict[str, str] = field(default_factory=dict)
    path: str = ""

    @property
    def name(self) -> str:
        return self.machine.guest.name

    @property
    def node_id(self) -> str:
        return self.machine.node_id

    def publish(self) -> None:
        self.context = self.cluster.publish(self.volume_id, self.machine)

    def attach(self) -> None:
        self.cluster.stage(self.volume_id, self.machine, self.context)
        self.path = self.cluster.mount(self.volume_id, self.machine)
        names = self.machine.guest.sh("cat /sys/class/scsi_disk/*/device/wwid").split()
        assert names == [f"naa.{scsi_id_of(self.volume_id)}"], "another disk than its own is here"

    def write(self) -> int:
        self.machine.guest.sh(f"yes {self.name} | head -c {_FILE} > {self.path}/data && sync {self.path}/data", 300)
        return _FILE

    def verify(self) -> int:
        look = f"echo 1 > /proc/sys/vm/drop_caches; yes {self.name} | head -c {_FILE} | cmp - {self.path}/data"
        self.machine.guest.sh(look, 300)
        return _FILE

    def release(self) -> None:
        self.cluster.detach(self.volume_id, self.machine)


@dataclass
class Client:
    """A CNODE without a kernel: its volume is a raw device in a session of libiscsi, written from end to end."""

    size_bytes: ClassVar[int] = 4 * MIB

    name: str
    key: NodeKey
    network: Network
    cluster: Cluster
    volume_id: str = ""
    context: dict[str, str] = field(default_factory=dict)
    attachment: Attachment | None = None
    session: Session | None = None

    @property
    def initiator(self) -> str:
        return f"iqn.2026-11.io.test:{self.name}"

    @property
    def node_id(self) -> str:
        return str(NodeId(self.name, public_key=self.key.public, initiator=self.initiator))

    @property
    def path(self) -> IscsiPath:
        assert self.attachment
        return self.attachment.paths[0]

    @property
    def chap(self) -> Chap:
        assert self.attachment and self.attachment.chap
        return self.attachment.chap

    def opened(self, volume_id: str, context: dict[str, str], *, node_id: str) -> Attachment:
        """What the node service makes of a publish_context, with this client's key."""
        bound_to = publish_context.binding(volume_id, node_id, context)
        return publish_context.decode(
            volume_id, context, open_sealed=lambda sealed: self.key.open(sealed, bound_to=bound_to)
        )

    def log_in(self, path: IscsiPath, *, initiator: str = "", chap: Chap | None) -> Session:
        return self.network.inside(lambda: Session(path, initiator=initiator or self.initiator, chap=chap))

    def publish(self) -> None:
        request = pb.ControllerPublishVolumeRequest(
            volume_id=self.volume_id, node_id=self.node_id, volume_capability=capability(block=True)
        )
        answer = self.cluster.snode.stubs["controller"].ControllerPublishVolume(request, timeout=120)
        self.context = dict(answer.publish_context)
        self.attachment = self.opened(self.volume_id, self.context, node_id=self.node_id)

    def attach(self) -> None:
        self.session = self.log_in(self.path, chap=self.chap)
        assert self.session.scsi_id() == scsi_id_of(self.volume_id) == self.context["scsi_id"]
        assert self.session.size_bytes() == self.size_bytes

    def pattern(self, offset: int, length: int) -> bytes:
        """What this client writes there: each sector has its name and its place."""
        first = offset // SECTOR
        return b"".join(f"{self.name} {first + n}\n".encode().ljust(SECTOR, b".") for n in range(length // SECTOR))

    def write(self) -> int:
        assert self.session
        for offset in range(0, self.size_bytes, WRITE):
            self.session.write(offset, self.pattern(offset, WRITE))
        self.session.flush()
        return self.size_bytes

    def verify(self) -> int:
        assert self.session
        for offset in range(0, self.size_bytes, CHUNK):
            assert self.session.read(offset, CHUNK) == self.pattern(offset, CHUNK), f"{self.name}: at byte {offset}"
        return self.size_bytes

    def release(self) -> None:
        """Unpublished while it writes, as a CNODE that is lost and alive."""
        request = pb.ControllerUnpublishVolumeRequest(volume_id=self.volume_id, node_id=self.node_id)
        began = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(self.write_until_refused, began)
            assert began.wait(60), f"{self.name} can't write before"
            self.cluster.snode.stubs["controller"].ControllerUnpublishVolume(request, timeout=120)
            writer.result(60)

    def write_until_refused(self, began: threading.Event) -> None:
        """Write again and again. began: set after the first one."""
        assert self.session
        with suppress(IscsiError):
            for count in itertools.count():
                self.session.write(0, f"{self.name} late {count}\n".encode().ljust(SECTOR, b"."))
                began.set()

"""The driver itself starts in the guests, from the working tree, and answers over the lab's network."""

import time

import grpc
import pytest

from csi.pb import csi_pb2 as pb
from csi.pb import csi_pb2_grpc

from . import Guest, Lab, roles
from .conftest import Say, seconds

pytestmark = pytest.mark.lab

CONTROLLER = """
[controller]
portals = ["{portal}"]

[pools.fast]
type = "lvm"
vg = "vg0"
"""


def is_ready(lab: Lab, guest: Guest, driver: roles.Driver) -> bool:
    roles.serve_tcp(guest, driver.socket, 9000)
    with grpc.insecure_channel(f"unix:{lab.forward(guest.ip, 9000)}") as channel:
        answer: pb.ProbeResponse = csi_pb2_grpc.IdentityStub(channel).Probe(pb.ProbeRequest(), timeout=30)
    return not answer.HasField("ready") or answer.ready.value


def test_driver_serves_in_snode_and_cnode(lab: Lab, say: Say) -> None:
    snode, cnode = roles.add_snode(lab), roles.add_cnode(lab)
    lab.boot_all()
    roles.start_snode(snode)
    roles.start_cnode(cnode)
    began = time.monotonic()
    controller = roles.start_driver(snode, "controller", CONTROLLER.format(portal=roles.portal(snode)))
    say(f"controller listens after {seconds(began)}")
    node = roles.start_driver(cnode, "node", "")
    assert is_ready(lab, snode, controller)
    assert is_ready(lab, cnode, node)
    assert controller.stop() == 0
    node.kill9()
    assert node.process.rc == -9

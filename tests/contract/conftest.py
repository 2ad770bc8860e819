"""What the contract is compared with."""

import subprocess
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

# Also imported for its extensions: without them the published options could not be named.
from csi.pb import csi_pb2
from tests.tools.build import ToolError, tool_path


@pytest.fixture(scope="session")
def published(request: pytest.FixtureRequest) -> FileDescriptorProto:
    """The published descriptor of CSI. Read as a plain message: as a second csi.v1 it would not fit into the pool."""
    done = subprocess.run([str(_tool(request.config))], capture_output=True, check=True, timeout=60)
    return FileDescriptorProto.FromString(done.stdout)


@pytest.fixture
def ours() -> FileDescriptorProto:
    """The descriptor of proto/csi.proto, as the generated code holds it; a copy to change freely."""
    return FileDescriptorProto.FromString(csi_pb2.DESCRIPTOR.serialized_pb)


def _tool(config: pytest.Config) -> Path:
    try:
        with _uncaptured(config):
            return tool_path("descriptors")
    except ToolError as error:
        pytest.fail(str(error), pytrace=False)


def _uncaptured(config: pytest.Config) -> AbstractContextManager[None]:
    """Lets the line about a long build through to the terminal."""
    capture = config.pluginmanager.getplugin("capturemanager")
    disabled: AbstractContextManager[None] = capture.global_and_fixture_disabled() if capture else nullcontext()
    return disabled

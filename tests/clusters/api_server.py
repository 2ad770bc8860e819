"""A Kubernetes API server with etcd and nothing else: it judges objects, and says who may do what."""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from tests.clusters.manifests import Object
from tests.tools.build import tool_path

_SECONDS = 60.0
_TOKEN = "administrator"


class ApiServer:
    """Use `api_server()`. Its admin is a member of system:masters."""

    def __init__(self, url: str) -> None:
        self.url, self.token = url, _TOKEN
        self._kubectl = [
            str(tool_path("kubectl")), f"--server={url}", "--insecure-skip-tls-verify", f"--token={_TOKEN}",
            "--kubeconfig=/dev/null", f"--cache-dir={tempfile.gettempdir()}/snode-kubectl-cache",
        ]  # fmt: skip

    def kubectl(self, *words: str, objects: Iterable[Object] = ()) -> "subprocess.CompletedProcess[str]":
        """A kubectl command; objects are its standard input."""
        text = yaml.safe_dump_all(objects)
        return subprocess.run([*self._kubectl, *words], input=text, capture_output=True, text=True, timeout=_SECONDS)

    def apply(self, objects: Iterable[Object], *, dry: bool = False) -> None:
        """Apply objects, or only let the server judge them. An unknown field is a fault."""
        words = ["apply", "--validate=strict", "--filename=-", *(["--dry-run=server"] if dry else [])]
        done = self.kubectl(*words, objects=objects)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr

    def may(self, account: str, verb: str, what: str, namespace: str) -> bool:
        """Whether a service account (`namespace:name`) may do something."""
        resource, _, part = what.partition("/")
        words = [verb, resource, f"--subresource={part}", f"--namespace={namespace}"]
        said = self.kubectl("auth", "can-i", *words, f"--as=system:serviceaccount:{account}").stdout.strip()
        assert said in ("yes", "no"), said
        return said == "yes"


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """Runs for as long as the block."""
    etcd = shutil.which("etcd")
    assert etcd, "etcd is missing: apt-get install etcd-server"
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        client, peer, port = (_free_port() for _ in range(3))
        key = folder / "key.pem"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (folder / "tokens.csv").write_text(f"{_TOKEN},admin,1,system:masters\n")
        running.enter_context(_serving(folder, [
            etcd, f"--data-dir={folder}/etcd", "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{client}", f"--advertise-client-urls=http://127.0.0.1:{client}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
        ]))  # fmt: skip
        server = running.enter_context(_serving(folder, [
            str(tool_path("kube-apiserver")), f"--etcd-servers=http://127.0.0.1:{client}", f"--cert-dir={folder}/certs",
            "--bind-address=127.0.0.1", f"--secure-port={port}", f"--token-auth-file={folder}/tokens.csv",
            "--authorization-mode=Node,RBAC", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--service-account-issuer=https://test",
            "--service-cluster-ip-range=10.98.0.0/24", "--allow-privileged=true",
        ]))  # fmt: skip
        api = ApiServer(f"https://127.0.0.1:{port}")
        end = time.monotonic() + _SECONDS
        while api.kubectl("get", "--raw=/readyz").stdout != "ok":
            assert server.poll() is None and time.monotonic() < end, (folder / "kube-apiserver.log").read_text()[-3000:]
            time.sleep(0.3)
        yield api


@contextmanager
def _serving(folder: Path, argv: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    with (folder / f"{Path(argv[0]).name}.log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])

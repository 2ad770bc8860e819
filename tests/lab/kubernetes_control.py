"""Kubernetes' control plane on the host, in the lab's network: etcd, API server, controller manager and scheduler."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kubernetes import client, config
from urllib3.connection import HTTPSConnection
from urllib3.connectionpool import HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from tests.tools.build import tool_path

from .errors import LabError
from .lab import Lab
from .network import HOST_IP

T = TypeVar("T")
#: The addresses of Services; the first one is the API server's.
SERVICES = "10.98.0.0/24"
_API_SERVICE = "10.98.0.1"
_ETCD = "http://127.0.0.1:2379"
_NODE_ROLE = "system:node:"


class ControlPlane:
    """Runs until the lab ends. Users are the admin and the nodes, each with a token that is its name."""

    def __init__(self, lab: Lab, nodes: Sequence[str], *, manager: Sequence[str] = ()) -> None:
        """manager: further arguments of the controller manager."""
        self._lab = lab
        self._folder = lab.folder / "control"
        self._folder.mkdir()
        self._nodes = list(nodes)
        self._manager = list(manager)
        self._kubeconfig = self._folder / "admin.kubeconfig"
        self._clients: list[client.ApiClient] = []
        self.programs: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all of it; returns once the API server is ready."""
        etcd = shutil.which("etcd", path="/usr/local/bin:/usr/bin")
        if etcd is None:
            raise LabError("etcd is missing: apt-get install etcd-server")
        users = ["admin,admin,1,system:masters"]
        users += [f"{name},{_NODE_ROLE}{name},{name},system:nodes" for name in self._nodes]
        (self._folder / "tokens.csv").write_text("\n".join(users) + "\n")
        self._kubeconfig.write_text(json.dumps(self.kubeconfig("admin")))
        self._run("ip", "addr", "add", f"{_API_SERVICE}/32", "dev", "lo")
        subprocess.run(["openssl", "genrsa", "-out", str(self._key), "2048"], check=True, capture_output=True)
        self._serve(
            "etcd", etcd, f"--data-dir={self._folder}/etcd", "--unsafe-no-fsync",
            f"--listen-client-urls={_ETCD}", f"--advertise-client-urls={_ETCD}",
        )  # fmt: skip
        self._start_api_server()
        until("the API server is ready", self._is_ready, 60)
        self._serve(
            "kube-controller-manager", str(tool_path("kube-controller-manager")), f"--kubeconfig={self._kubeconfig}",
            f"--service-account-private-key-file={self._key}", "--use-service-account-credentials",
            f"--root-ca-file={self._certificate}", "--leader-elect=false", *self._manager,
        )  # fmt: skip
        self._serve(
            "kube-scheduler", str(tool_path("kube-scheduler")), f"--kubeconfig={self._kubeconfig}",
            "--leader-elect=false",
        )  # fmt: skip

    def kubeconfig(self, user: str) -> dict[str, Any]:
        """How a user reaches the API server, as a kubeconfig."""
        cluster = {"server": f"https://{HOST_IP}", "insecure-skip-tls-verify": True}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "users": [{"name": user, "user": {"token": user}}],
            "clusters": [{"name": "lab", "cluster": cluster}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
        }

    def client(self, user: str = "admin") -> client.ApiClient:
        """A client of the Python library for this process, which is outside of the lab's network."""
        settings = client.Configuration()
        settings.retries = 3
        config.load_kube_config_from_dict(self.kubeconfig(user), client_configuration=settings, persist_config=False)
        settings.verify_ssl, settings.ssl_ca_cert = True, self._certificate
        made = client.ApiClient(settings)
        made.rest_client.pool_manager.pool_classes_by_scheme = {"https": _pool_in(self._lab)}
        self._clients.append(made)
        return made

    def kubectl(self, *words: str, stdin: str = "", timeout: float = 60) -> str:
        """Output of a kubectl command as the admin. Raises LabError, with all it said, when it fails."""
        return self._run(str(tool_path("kubectl")), f"--kubeconfig={self._kubeconfig}", *words, stdin=stdin,
                         timeout=timeout)  # fmt: skip

    def close(self) -> None:
        """Close the clients' connections."""
        for made in self._clients:
            made.rest_client.pool_manager.clear()
            made.close()

    def kill_api_server(self) -> None:
        """End it at once."""
        self.programs["kube-apiserver"].kill()
        self.programs["kube-apiserver"].wait()

    def restart_api_server(self) -> None:
        """Start it again; returns once it is ready."""
        self._start_api_server()
        until("the API server is ready again", self._is_ready, 60)

    def _start_api_server(self) -> None:
        self._serve(
            "kube-apiserver", str(tool_path("kube-apiserver")), f"--etcd-servers={_ETCD}",
            f"--cert-dir={self._folder}/certs", "--bind-address=0.0.0.0", "--secure-port=443",
            f"--advertise-address={HOST_IP}", f"--token-auth-file={self._folder}/tokens.csv",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            f"--service-account-key-file={self._key}", f"--service-account-signing-key-file={self._key}",
            "--service-account-issuer=https://lab", f"--service-cluster-ip-range={SERVICES}",
            "--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP",
        )  # fmt: skip

    def _is_ready(self) -> bool:
        try:
            return self.kubectl("get", "--raw=/readyz") == "ok"
        except LabError:
            return False

    @property
    def _key(self) -> str:
        return str(self._folder / "sa.key")

    @property
    def _certificate(self) -> str:
        """The API server's, which it makes itself."""
        return str(self._folder / "certs" / "apiserver.crt")

    def _serve(self, name: str, *argv: str) -> None:
        with (self._lab.logs / f"{name}.log").open("ab") as log:
            self.programs[name] = self._lab.popen(argv, stdout=log, stderr=log, cwd=self._folder)

    def _run(self, *argv: str, stdin: str = "", timeout: float = 60) -> str:
        with tempfile.TemporaryFile() as file:
            file.write(stdin.encode())
            file.seek(0)
            process = self._lab.popen(argv, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out = process.communicate(timeout=timeout)[0].decode(errors="replace").strip()
        if process.returncode:
            raise LabError(f"{' '.join(argv)}\n-> {process.returncode}\n{out}")
        return out


def until(what: str, check: Callable[[], T], seconds: float = 60, *, every: float = 0.25) -> T:
    """The first result of `check` that counts as true; LabError with the last one after `seconds`.

    SNODE_LAB_PATIENCE=4 waits four times as long, on a machine that does other things too.
    """
    seconds *= float(os.environ.get("SNODE_LAB_PATIENCE", "1"))
    end = time.monotonic() + seconds
    while not (result := check()):
        if time.monotonic() > end:
            raise LabError(f"not within {seconds:.0f} s: {what}; last seen: {result!r}")
        time.sleep(every)
    return result


def _pool_in(lab: Lab) -> type[HTTPSConnectionPool]:
    """Connections that are made in the lab's network."""

    class Connection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            try:
                return lab.connect(self.host, self.port or 443)
            except OSError as error:
                raise NewConnectionError(self, f"{self.host}: {error}") from error

    class Pool(HTTPSConnectionPool):
        ConnectionCls = Connection

    return Pool

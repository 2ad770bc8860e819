"""The Go programs that the tests use, and how each is built. Versions stand in the go.mod of their group's folder."""

from dataclasses import dataclass, field
from pathlib import Path

_HERE = Path(__file__).resolve().parent


class ToolError(Exception):
    """A tool can't be had. The message says which one and what to do."""


@dataclass(frozen=True)
class Program:
    """One program."""

    package: str  # what `go build` gets
    module: str  # whose version in go.mod is the program's
    variables: tuple[str, ...] = ()  # set to values in which {version}, {major} and {minor} are replaced


@dataclass(frozen=True)
class Group:
    """Programs that one call of `go build` makes, since they share most of their code."""

    programs: dict[str, Program]
    first_time: str  # how long the first build takes on two cores
    folder: Path = _HERE  # where their go.mod is
    tags: tuple[str, ...] = ()
    sources: tuple[Path, ...] = field(default=())  # folders of our own code


def _kubernetes(name: str) -> Program:
    version = "k8s.io/component-base/version"
    return Program(
        package=f"k8s.io/kubernetes/cmd/{name}",
        module="k8s.io/kubernetes",
        variables=(
            f"{version}.gitVersion={{version}}",
            f"{version}.gitMajor={{major}}",
            f"{version}.gitMinor={{minor}}",
        ),
    )


def _sidecar(name: str, repository: str) -> Program:
    module = f"github.com/kubernetes-csi/{repository}"
    return Program(package=f"{module}/cmd/{name}", module=module, variables=("main.version={version}",))


def _containerd(name: str) -> Program:
    module = "github.com/containerd/containerd/v2"
    return Program(f"{module}/cmd/{name}", module, variables=(f"{module}/version.Version={{version}}",))


#: In the order in which they are best built: what is quick first.
GROUPS = {
    "csi-sanity": Group(
        {
            "csi-sanity": Program(
                package="github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
                module="github.com/kubernetes-csi/csi-test/v5",
            )
        },
        first_time="about a minute",
    ),
    "descriptors": Group(
        {"descriptors": Program(package="./descriptors", module="github.com/container-storage-interface/spec")},
        first_time="about a minute",
        sources=(_HERE / "descriptors",),
    ),
    "containerd": Group(
        {name: _containerd(name) for name in ("containerd", "containerd-shim-runc-v2", "ctr")},
        first_time="about 2 minutes",
        folder=_HERE / "containerd",
        tags=("no_btrfs", "no_devmapper", "no_zfs"),
    ),
    "kubernetes": Group(
        {
            **{
                name: _kubernetes(name)
                for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl")
            },
            "csi-provisioner": _sidecar("csi-provisioner", "external-provisioner/v6"),
            "csi-attacher": _sidecar("csi-attacher", "external-attacher/v4"),
            "csi-resizer": _sidecar("csi-resizer", "external-resizer/v2"),
        },
        first_time="about 15 minutes",
        folder=_HERE / "kubernetes",
    ),
    "nomad": Group(
        {"nomad": Program("github.com/hashicorp/nomad", "github.com/hashicorp/nomad")},
        first_time="about 5 minutes",
        folder=_HERE / "nomad",
    ),
    "helm": Group(
        {
            "helm": Program(
                "helm.sh/helm/v4/cmd/helm", "helm.sh/helm/v4", ("helm.sh/helm/v4/internal/version.version={version}",)
            )
        },
        first_time="about 2 minutes",
        folder=_HERE / "helm",
    ),
}

#: Which group each program is built with.
GROUP_OF = {program: group for group, made in GROUPS.items() for program in made.programs}


def pick_groups(names: list[str]) -> list[str]:
    """The groups that hold these programs, or are called so; all of them for no name. Raises ToolError for others."""
    wanted = []
    for name in names:
        group = name if name in GROUPS else GROUP_OF.get(name)
        if group is None:
            raise ToolError(f"no test tool is called {name!r}; there are: {', '.join(GROUP_OF)}")
        wanted.append(group)
    return [group for group in GROUPS if group in wanted or not wanted]

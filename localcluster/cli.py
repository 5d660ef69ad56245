"""Run a real Kubernetes cluster on this machine."""

from __future__ import annotations

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from localcluster import build, images, paths, requirements
from localcluster.api import Endpoint
from localcluster.control_plane import CONTROL_PLANE_MODE, NODE_MODE, ControlPlane, read_mode
from localcluster.errors import LocalClusterError, NotRunning
from localcluster.node_cluster import NodeCluster, list_ready_nodes
from localcluster.processes import Lifetime
from localcluster.steps import show_step

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
node_app = typer.Typer(help="Make a node fail, and recover it.", no_args_is_help=True)
images_app = typer.Typer(help="Build the project's container images.", no_args_is_help=True)
app.add_typer(node_app, name="node")
app.add_typer(images_app, name="images")


class Mode(StrEnum):
    """Kind of cluster that `up` starts."""

    CONTROL_PLANE = CONTROL_PLANE_MODE
    NODE = NODE_MODE


INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C or SIGTERM."""
NameOption = Annotated[str, typer.Option(help="Name of the cluster.")]
StateOption = Annotated[Path | None, typer.Option(help="Folder for the cluster's files (default: a folder in the cache).", file_okay=False)]


def choose_state_folder(name: str, given_folder: Path | None) -> Path:
    """Return the state folder: `given_folder`, or the default folder of the cluster `name` if `given_folder` is None."""
    return (given_folder or paths.get_default_state_folder(name)).absolute()


@app.command()
def up(
    mode: Annotated[Mode, typer.Option(help="node: start nodes that run pods (needs root); control-plane: start no nodes.")] = Mode.NODE,
    nodes: Annotated[int, typer.Option(min=1, max=4, help="Number of nodes (only with --mode node).")] = 1,
    gpus: Annotated[int, typer.Option(min=0, max=64, help="Number of simulated GPUs per node (only with --mode node).")] = 0,
    name: NameOption = "default",
    state: StateOption = None,
) -> None:
    """Start a cluster unless it is already running. Print the command that sets KUBECONFIG, and the S3 address."""
    state_dir = choose_state_folder(name, state)
    if mode is Mode.CONTROL_PLANE:
        if nodes != 1 or gpus:
            raise typer.BadParameter("--nodes and --gpus need --mode node: a control plane alone has no nodes")
        endpoint = ControlPlane(state_dir, lifetime=Lifetime.UNTIL_STOPPED, step=show_step).up()
    else:
        cluster = NodeCluster(state_dir, nodes=nodes, gpus=gpus, lifetime=Lifetime.UNTIL_STOPPED, step=show_step).up()
        endpoint = cluster.endpoint
        typer.echo(f"# S3: {cluster.s3.host_url} on this machine, {cluster.s3.cluster_url} in pods")
    typer.echo(f"export KUBECONFIG={endpoint.kubeconfig}")


@app.command()
def down(
    name: NameOption = "default",
    state: StateOption = None,
    purge: Annotated[bool, typer.Option(help="Also remove the images that the nodes have cached.")] = False,
) -> None:
    """Stop a cluster. Without --purge, the nodes keep their images for the next cluster."""
    state_dir = choose_state_folder(name, state)
    with show_step(f"stop the cluster in {state_dir}"):
        if read_mode(state_dir) == CONTROL_PLANE_MODE or os.geteuid() != 0:
            ControlPlane(state_dir).down()
        else:
            cluster = NodeCluster(state_dir)
            cluster.purge() if purge else cluster.down()


def open_endpoint(state_dir: Path) -> Endpoint:
    """Return the API server endpoint of the cluster in `state_dir`. Errors: NotRunning."""
    endpoint = NodeCluster(state_dir).endpoint if read_mode(state_dir) == NODE_MODE else ControlPlane(state_dir).find_running_endpoint()
    if endpoint is None or not endpoint.is_ready():
        raise NotRunning(f"no cluster is running in {state_dir}: run `localcluster up`")
    return endpoint


@app.command()
def status(name: NameOption = "default", state: StateOption = None) -> None:
    """Show API server, nodes and S3 of a running cluster. Exits with code 1 if the cluster is not running."""
    state_dir = choose_state_folder(name, state)
    endpoint = open_endpoint(state_dir)
    typer.echo(f"mode    {read_mode(state_dir)}\nserver  {endpoint.server}\nconfig  {endpoint.kubeconfig}")
    if read_mode(state_dir) == NODE_MODE:
        cluster = NodeCluster(state_dir)
        ready_node_names = list_ready_nodes(endpoint)
        node_states = ", ".join(f"{n.name} {'Ready' if n.name in ready_node_names else 'NotReady'}" for n in cluster.plan.nodes)
        typer.echo(f"nodes   {node_states}\ns3      {cluster.s3.host_url} on this machine, {cluster.s3.cluster_url} in pods")


@app.command()
def kubeconfig(name: NameOption = "default", state: StateOption = None) -> None:
    """Print the path of the kubeconfig, for use in: export KUBECONFIG=$(localcluster kubeconfig)."""
    typer.echo(open_endpoint(choose_state_folder(name, state)).kubeconfig)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def kubectl(context: typer.Context, name: NameOption = "default", state: StateOption = None) -> NoReturn:
    """Run kubectl on the cluster, for example: localcluster kubectl -- get pods -A."""
    kube_program = build.ensure_built(build.KUBE_PROGRAM, show_step)
    kubeconfig_path = open_endpoint(choose_state_folder(name, state)).kubeconfig
    os.execv(kube_program, [str(kube_program), "kubectl", "--kubeconfig", str(kubeconfig_path), *context.args])


@app.command("load-image")
def load_image(
    image: Annotated[str, typer.Argument(help="Folder with an OCI layout, or tag of an image from `localcluster images build`.")],
    name: NameOption = "default",
    state: StateOption = None,
) -> None:
    """Load an image into all nodes."""
    source = Path(image) if Path(image).is_dir() else image
    typer.echo(NodeCluster(choose_state_folder(name, state), step=show_step).load_image(source))


@app.command("build")
def build_programs() -> None:
    """Build the cluster's programs from Go modules unless they are cached."""
    for program in build.PROGRAM_BY_NAME.values():
        if not program.is_optional:
            typer.echo(build.ensure_built(program.name, show_step))


@app.command()
def packages(install: Annotated[bool, typer.Option(help="Install missing packages with apt.")] = False) -> None:
    """Check the Debian packages that nodes, image builds and tests of NetworkPolicies need."""
    package_by_program = {**requirements.NODE_PACKAGES, **requirements.IMAGE_PACKAGES, **requirements.TEST_PACKAGES}
    missing_packages = requirements.list_missing_packages(package_by_program)
    if missing_packages and install:
        with show_step(f"install {' '.join(missing_packages)}"):
            requirements.install_packages(missing_packages)
    requirements.check_packages(package_by_program)
    typer.echo(f"present: {' '.join(sorted(set(package_by_program.values())))}")


@node_app.command("stop")
def node_stop(node: str, name: NameOption = "default", state: StateOption = None) -> None:
    """Kill the kubelet of a node. The node becomes NotReady, and its containers keep running."""
    NodeCluster(choose_state_folder(name, state)).stop_kubelet(node)


@node_app.command("kill")
def node_kill(node: str, name: NameOption = "default", state: StateOption = None) -> None:
    """Simulate a power cut: kill kubelet, containerd and all containers of the node."""
    NodeCluster(choose_state_folder(name, state)).power_off(node)


@node_app.command("start")
def node_start(node: str, name: NameOption = "default", state: StateOption = None) -> None:
    """Start a stopped or killed node again, and wait until it is ready."""
    with show_step(f"start {node}"):
        NodeCluster(choose_state_folder(name, state)).start_node(node)


@images_app.command("build")
def images_build(
    which: Annotated[list[images.ImageName], typer.Argument(help="operator, trainer, s3, cli, or all (operator, trainer and s3).")],
) -> None:
    """Build images as OCI layouts in the cache, and print the tag and folder of each."""
    for built_image in images.build_images(which, show_step):
        typer.echo(f"{built_image.tag} {built_image.layout_folder}")


def main() -> None:
    """Run the console script. Prints a LocalClusterError as one line. SIGTERM has the same effect as Ctrl-C: the command cleans up and exits."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except LocalClusterError as error:
        print(f"localcluster: {error.message}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as exit_request:
        if exit_request.code == INTERRUPTED_EXIT_CODE:
            print("localcluster: interrupted; all started processes were stopped", file=sys.stderr)
        raise

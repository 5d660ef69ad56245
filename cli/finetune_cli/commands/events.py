"""`finetune events`: the Kubernetes events of a job and of its pods."""

from __future__ import annotations

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption


def events(
    name: NameArgument,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """List the events of a job and of its pods, oldest first.

    Example: finetune events support-bot
    """
    from finetune_cli.cluster import connect
    from finetune_cli.status_text import format_event_line

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get_job(name)
    object_uids = {job["metadata"]["uid"], *(pod["metadata"]["uid"] for pod in cluster.list_pods(name))}
    event_objects = cluster.list_events(object_uids)
    if not event_objects:
        output.print_notes(
            [
                f"{name} has no events: the cluster deletes events after some time; `finetune status {name}` still shows the status"
            ]
        )
        return
    output.write("\n".join(format_event_line(event) for event in event_objects))

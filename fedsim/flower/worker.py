"""A process that stays at work beside a SuperNode: it runs the app's tasks one after the other, with imports done and data in memory.

Flower starts a process for every message (`flower-superexec`, `flwr-clientapp`): two seconds of imports, and the data are loaded anew. This
does what these do, by the same calls, in one process. `fedsim.flower.node` starts it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from logging import ERROR
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.cli.install import install_from_fab
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.config import get_project_dir
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore import log
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedsim.flower.polling import look_soon


def client_of(address: str, component: str, *more: Any) -> RuntimeHttpClient:
    """A client of the SuperNode's API for its processes, which is on this machine only."""
    interceptors = [RuntimeVersionHttpInterceptor(component_name=component), *more]
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=interceptors,
        retry_invoker=make_simple_http_retry_invoker(),
    )


class Apps:
    """The app at hand. Another app's modules may have the same names, so those of the one before are forgotten."""

    def __init__(self) -> None:
        self._hash = ""
        self._folder: Path | None = None
        self._app: Callable[[Message, Context], Message] | None = None

    def app(self, run: Any, fab: Any) -> Callable[[Message, Context], Message]:
        """The client app of a run."""
        if self._app is None or fab.hash_str != self._hash:
            self._forget()
            install_from_fab(fab.content, skip_prompt=True)
            self._folder = get_project_dir(run.fab_id, run.fab_version, fab.hash_str)
            self._app = get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)(run.fab_id, run.fab_version, fab.hash_str)
            self._hash = fab.hash_str
        return self._app

    def _forget(self) -> None:
        if self._folder is None:
            return
        sys.path[:] = [entry for entry in sys.path if entry != str(self._folder)]
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{self._folder}/"):
                del sys.modules[name]
        self._app = None


def serve(address: str, token: str, apps: Apps) -> None:
    """Run one task: what `flwr-clientapp` does. What the app raises becomes its answer."""
    client = client_of(address, "flwr-clientapp", RuntimeTokenHttpInterceptor(token))
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    message: Message | None = None
    reply: Message | None = None
    context: Context | None = None
    status, details = SubStatus.FAILED, "the task did not begin"
    try:
        heartbeat.start()
        message, context, run, fab = pull_task_input(client)
        reply = apps.app(run, fab)(message, context)
        status, details = SubStatus.COMPLETED, ""
    except Exception as error:
        log(ERROR, "the client app raised an exception", exc_info=error)
        details = f"{type(error)}:<'{error}'>"
        if message is not None:
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, details), reply_to=message)
    try:
        if reply is not None and context is not None:
            push_message(client, reply, context)
    except Exception as error:
        log(ERROR, "the answer could not be handed over", exc_info=error)
    push_task_output(client=client, context=context, sub_status=status, details=details)
    if heartbeat.is_running:
        heartbeat.stop()
    client.close()


def main(arguments: list[str] | None = None) -> None:
    """Serve until the process that started this one ends."""
    parser = argparse.ArgumentParser(description="Keep one process at work beside a SuperNode.")
    parser.add_argument("--address", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--poll", type=float, default=0.1)
    chosen = parser.parse_args(arguments)
    start_parent_process_monitor(chosen.parent)
    look_soon()
    from fedsim.scenario import adapter

    adapter()  # all strategies, and the check of scenarios: a second that the first round need not wait for
    from fedsim.flower import client_app, device  # noqa: F401

    client, apps = client_of(chosen.address, "SuperExec"), Apps()
    while True:
        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if found.HasField("task") and found.token:
            serve(chosen.address, found.token, apps)
        else:
            time.sleep(chosen.poll)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

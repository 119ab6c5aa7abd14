"""A small client of ComfyUI's HTTP API; every error is a sentence for the user."""

import json
import time
import uuid
from pathlib import Path
from urllib.parse import urlencode

import requests


class ComfyError(Exception):
    """What went wrong at the server, in a sentence."""


class NoAnswer(ComfyError):
    """The server cannot be reached, or has gone."""


class ComfyClient:
    """Talks to one ComfyUI server.

    Args:
        url: such as "http://127.0.0.1:8188".
        timeout: seconds that one answer may take.
    """

    def __init__(self, url, timeout=60):
        self.url, self.timeout, self._id = url.rstrip("/"), timeout, uuid.uuid4().hex
        self._session = requests.Session()
        # The server is on this machine or near it: a proxy of the environment must not come between.
        self._session.trust_env = False

    def ask(self, path, data=None, files=None):
        """The bytes that the server answers to a GET, or to a POST of `data`: JSON as bytes, or with `files` a form."""
        method = "GET" if data is None else "POST"
        headers = {"Content-Type": "application/json"} if data is not None and files is None else None
        try:
            answer = self._session.request(method, self.url + path, data=data, files=files, headers=headers,
                                           timeout=self.timeout)
        except (OSError, ValueError) as error:
            raise NoAnswer(
                f"ComfyUI does not answer at {self.url} ({_reason(error)}): start it, or give the right address."
            ) from None
        if not answer.ok:
            raise ComfyError(_refusal(path, answer.status_code, answer.content))
        return answer.content

    def ask_json(self, path, data=None):
        """As `ask`, with JSON both ways."""
        return json.loads(self.ask(path, None if data is None else json.dumps(data).encode()))

    def check(self, node="LEDITS_KSampler"):
        """Whether the server is a ComfyUI that has a node of this pack.

        Raises:
            ComfyError: it is not, or has not.
        """
        try:
            is_comfy = "comfyui_version" in self.ask_json("/system_stats")["system"]
        except NoAnswer:
            raise
        except (ComfyError, ValueError, TypeError, KeyError):
            is_comfy = False
        if not is_comfy:
            raise ComfyError(
                f"The server at {self.url} is no ComfyUI: give the address that ComfyUI prints when it starts."
            )
        if node not in self.ask_json(f"/object_info/{node}"):
            raise ComfyError(
                f"The ComfyUI at {self.url} has no node {node}: put this pack into its custom_nodes and start it again."
            )

    def object_info(self):
        """Every node the server has: {class: description}."""
        return self.ask_json("/object_info")

    def upload(self, path, subfolder="", data=None, folder="input"):
        """Copy a picture into a folder of the server; returns the name that a Load Image node takes.

        Args:
            path: the file; only its name where `data` is given.
            data: its bytes.
            folder: "input", or "temp", which ComfyUI empties.
        """
        path = Path(path)
        form = {"overwrite": "true", "subfolder": subfolder, "type": folder}
        image = path.name, path.read_bytes() if data is None else data
        found = json.loads(self.ask("/upload/image", form, files={"image": image}))
        name = "/".join(part for part in (found["subfolder"], found["name"]) if part)
        return name if folder == "input" else f"{name} [{folder}]"

    def queue(self, prompt):
        """Queue a workflow in the API format; returns its id.

        With a client's id, since ComfyUI 0.18 leaves what a cached node shows out of the history of prompts without.
        """
        return self.ask_json("/prompt", {"prompt": prompt, "client_id": self._id})["prompt_id"]

    def wait(self, prompt_id, seconds=3600, progress=None):
        """The history entry of a prompt that has succeeded.

        Args:
            seconds: how long to wait at most.
            progress: called with the seconds waited so far, several times a second.

        Raises:
            ComfyError: the prompt failed, was interrupted, or vanished from the queue.
        """
        begin, missing = time.monotonic(), 0
        while (waited := time.monotonic() - begin) < seconds:
            entry = self.ask_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _succeeded(entry)
            queue = self.ask_json("/queue")
            queued = any(item[1] == prompt_id for item in queue["queue_running"] + queue["queue_pending"])
            missing = 0 if queued else missing + 1
            if missing > 20:  # between queue and history there is a moment in neither
                raise ComfyError("The workflow was removed from the server's queue: run it again.")
            if progress is not None:
                progress(waited)
            time.sleep(0.05 if waited < 2 else 0.25)
        raise ComfyError(f"The workflow did not end within {seconds} seconds: look at the server's log.")

    def run(self, prompt, progress=None):
        """Queue a workflow and wait for it; its history entry."""
        return self.wait(self.queue(prompt), progress=progress)

    def cancel(self, prompt_ids):
        """Take prompts from the queue, and stop the one that runs."""
        self.ask("/queue", json.dumps({"delete": list(prompt_ids)}).encode())
        running = {entry[1] for entry in self.ask_json("/queue")["queue_running"]}
        for prompt_id in running & set(prompt_ids):
            self.ask("/interrupt", json.dumps({"prompt_id": prompt_id}).encode())

    def fetch(self, image):
        """The bytes of a file that a history entry names ({"filename", "subfolder", "type"})."""
        return self.ask("/view?" + urlencode(image))


def seconds_of(entry):
    """Seconds from the start of a prompt's execution to its end, from its history entry."""
    times = {name: data["timestamp"] for name, data in entry["status"]["messages"] if "timestamp" in data}
    return (times["execution_success"] - times["execution_start"]) / 1000


def _reason(error):
    """The system's own words; `requests` and urllib3 wrap them several times."""
    while isinstance(inner := error.__cause__ or error.__context__, Exception):
        error = inner
    return error


def _refusal(path, code, body):
    """A sentence from an HTTP error."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = {}
    answer = answer if isinstance(answer, dict) else {}
    error, nodes = answer.get("error"), answer.get("node_errors") or {}
    for node_id, node in nodes.items():
        for problem in node.get("errors", []):
            return (
                f"ComfyUI refused the workflow: node {node_id} ({node.get('class_type')}): {problem['message']}: "
                f"{problem.get('details')}."
            )
    message = error.get("message") if isinstance(error, dict) else error
    if message:
        details = error.get("details") if isinstance(error, dict) else ""
        return f"ComfyUI refused the request to {path}: {message}" + (f" ({details})." if details else ".")
    return f"ComfyUI answered {path} with error {code}: look at the server's log."


def _succeeded(entry):
    status = entry.get("status") or {}
    if status.get("status_str") == "success":
        return entry
    messages = dict(status.get("messages", []))
    if "execution_error" in messages:
        error = messages["execution_error"]
        raise ComfyError(
            f"The workflow failed at node {error['node_id']} ({error['node_type']}): "
            f"{error['exception_message'].strip()}"
        )
    raise ComfyError("The workflow was interrupted: run it again.")

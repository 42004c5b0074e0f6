"""Finding ComfyUIs, running scripts inside them, and talking to their servers."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("inside.py")
START_SECONDS = 240
RUN_SECONDS = 600
HEAVY_SECONDS = 3000


def comfyuis() -> list[Path]:
    """The ComfyUIs to test in: COMFYUI_PATH (several with the system's path separator), beside the project, two folders up."""
    given = [Path(path) for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]
    near = [ROOT.parent / "ComfyUI", ROOT.parent / "ComfyUI-new", ROOT.parent.parent]
    found = [path.resolve() for path in (*given, *near) if (path / "comfy" / "samplers.py").is_file()]
    return list(dict.fromkeys(found))


def python_of(comfyui: Path) -> str:
    """The Python that a ComfyUI runs in."""
    inside = [comfyui / name / "bin" / "python" for name in (".venv", "venv")]
    return os.environ.get("COMFYUI_PYTHON") or next((str(path) for path in inside if path.is_file()), sys.executable)


def make_base(folder: Path, models: Path) -> Path:
    """A base directory for a ComfyUI, with the pack linked in and ``models``' checkpoint folders."""
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/latent_classifiers"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "custom_nodes" / "latent_guidance").symlink_to(ROOT, target_is_directory=True)
    (folder / "models" / "latent_guidance").symlink_to(models / "latent_guidance", target_is_directory=True)
    return folder


def environment() -> dict[str, str]:
    """This process's environment without what would change the other Python."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))
    }


def run_inside(comfyui: Path, base: Path, script: str, folder: Path, *, seconds: float = RUN_SECONDS) -> dict[str, Any]:
    """What ``script`` leaves in ``result`` when it runs inside ``comfyui`` (see inside.py), in ``seconds`` at most."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    command = [
        python_of(comfyui),
        str(INSIDE),
        str(comfyui),
        str(base),
        str(folder / "script.py"),
        str(folder / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=folder, env=environment())
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads((folder / "out.json").read_text("utf-8"))


def run_beside(
    test: str, comfyui: Path, base: Path, folder: Path, *, head: str = "", seconds: float = RUN_SECONDS
) -> dict[str, Any]:
    """What the script of a file of tests (test_x.py: scripts_x.py beside it), with ``head`` before it, leaves in ``result``."""
    file = Path(test)
    script = file.with_name(file.name.replace("test_", "scripts_", 1)).read_text("utf-8")
    return run_inside(comfyui, base, head + script, folder, seconds=seconds)


class Refused(Exception):
    """The server refused a prompt, or a node failed; the message is what the user reads."""


@dataclass
class Server:
    """A running ComfyUI."""

    comfyui: Path
    base: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(default=Path())

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [python_of(self.comfyui), str(self.comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(self.base), "--preview-method", "auto"]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        self.log = self.base / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.comfyui,
                env=environment(),
                start_new_session=True,
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                self.get("/system_stats")
                return
            except OSError:
                assert self.process.poll() is None, f"the server ended:\n{self.text()[-4000:]}"
                time.sleep(0.3)
        raise AssertionError(f"the server did not start in {START_SECONDS} s:\n{self.text()[-4000:]}")

    def stop(self) -> None:
        """End the server and its children."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def text(self) -> str:
        """What the server has printed."""
        return self.log.read_text("utf-8", errors="replace")

    def get(self, path: str, **query: str) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, data: Mapping[str, Any]) -> Any:
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(data).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from None

    def queue(self, prompt: Mapping[str, Any], **more: Any) -> str:
        """Queue a prompt and give its id; ``more`` is sent along, such as ``client_id``."""
        return self.post("/prompt", {"prompt": prompt, **more})["prompt_id"]

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a prompt when it is done, whatever came of it."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            entry = self.json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            time.sleep(0.1)
        raise AssertionError(f"the prompt did not end in {RUN_SECONDS} s:\n{self.text()[-4000:]}")

    def run(self, prompt: Mapping[str, Any]) -> dict[str, list[np.ndarray[Any, Any]]]:
        """Node id -> pictures (H, W, 3) in [0, 1] of a prompt's output nodes.

        Raises:
            Refused: with the words that the user reads.
        """
        entry = self.wait(self.queue(prompt))
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                raise Refused(f"{message['node_type']}: {message['exception_message']}")
        assert entry["status"]["status_str"] == "success", entry["status"]
        return {
            node: [self.picture(image) for image in output["images"]]
            for node, output in entry["outputs"].items()
            if "images" in output
        }

    def picture(self, image: Mapping[str, str]) -> np.ndarray[Any, Any]:
        found = self.get("/view", filename=image["filename"], subfolder=image["subfolder"], type=image["type"])
        return np.asarray(Image.open(io.BytesIO(found)).convert("RGB"), dtype=np.float64) / 255


def psnr(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in [0, 1]; inf if they are equal."""
    assert first.shape == second.shape, (first.shape, second.shape)
    error = float(((first - second) ** 2).mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))

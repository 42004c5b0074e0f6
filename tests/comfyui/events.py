"""What a ComfyUI server tells the editor while a prompt runs: its websocket's messages."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from PIL import Image

from .comfy import RUN_SECONDS, Server

PREVIEW, TEXT = 1, 3
"""Kinds of binary messages: a preview frame, a text to show on a node."""
ENDS = ("execution_success", "execution_error", "execution_interrupted")


@dataclass
class Events:
    """The messages of one run, in order."""

    progress: list[tuple[str, int, int]] = field(default_factory=list)
    """(node id, steps done, steps in all)"""
    previews: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of each preview frame."""
    texts: dict[str, str] = field(default_factory=dict)
    """Node id -> the text shown on it."""
    end: str = ""
    """How it ended: one of ``ENDS``."""

    def steps(self) -> int:
        """The step that the last progress message names."""
        return self.progress[-1][1] if self.progress else 0

    def _binary(self, data: bytes) -> None:
        [kind] = struct.unpack(">I", data[:4])
        if kind == PREVIEW:
            with Image.open(io.BytesIO(data[8:])) as frame:
                self.previews.append(frame.size)
        elif kind == TEXT:
            [length] = struct.unpack(">I", data[4:8])
            self.texts[data[8 : 8 + length].decode()] = data[8 + length :].decode()

    def _text(self, message: Mapping[str, Any], prompt_id: str) -> None:
        kind, data = message["type"], message["data"]
        if kind == "progress":
            self.progress.append((data["node"], data["value"], data["max"]))
        elif kind in ENDS and data["prompt_id"] == prompt_id:
            self.end = kind


async def _watch(server: Server, prompt: Mapping[str, Any], each: Callable[[Events], None]) -> Events:
    client, events = uuid.uuid4().hex, Events()
    address = f"ws://127.0.0.1:{server.port}/ws?clientId={client}"
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        prompt_id = await asyncio.to_thread(server.queue, prompt, client_id=client)
        async with asyncio.timeout(RUN_SECONDS):
            while not events.end:
                message = await socket.receive()
                if message.type == aiohttp.WSMsgType.BINARY:
                    events._binary(message.data)
                else:
                    events._text(json.loads(message.data), prompt_id)
                await asyncio.to_thread(each, events)
    return events


def watch(server: Server, prompt: Mapping[str, Any], each: Callable[[Events], None] = lambda events: None) -> Events:
    """Queue ``prompt`` as an editor does and listen until it ends; ``each`` is called after every message."""
    return asyncio.run(_watch(server, prompt, each))

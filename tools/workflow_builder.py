"""Building workflow files in the editor's format from a few lines of Python.

Node positions and sizes are the author's; slots, widget values and the API twin follow from the nodes' own schemas.
"""

from __future__ import annotations

import math
import unicodedata
import uuid
from dataclasses import dataclass, field
from typing import Any

from latent_guidance.host.convert import default_value
from latent_guidance.host.schema import NodeLibrary, Schema

ROW, WIDGET, TEXT = 20, 24, 100
TEXT_KINDS = ("multiline",)


def _room(text: str, width: float) -> int:
    """How tall a paragraph of a note is, where characters are 14 wide if they are Chinese, else half of that."""
    lines = 0
    for paragraph in text.split("\n\n"):
        length = sum(14 if unicodedata.east_asian_width(character) in "WF" else 7 for character in paragraph)
        lines += math.ceil(length / (width - 40)) + 1
    return lines * ROW


@dataclass(frozen=True)
class Output:
    """An output slot of a node, to be given as another node's input."""

    node: Node
    slot: int
    kind: str


@dataclass(eq=False)
class Node:
    """A node on the canvas; index it for its outputs."""

    id: int
    schema: Schema
    title: str | None
    position: tuple[float, float]
    size: tuple[float, float]
    values: dict[str, Any]
    links: dict[str, Output]
    models: list[dict[str, str]] = field(default_factory=list)
    """Files that it needs, with where they can be had: the editor offers what is missing for download."""

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot, self.schema.outputs[slot])


@dataclass
class Workflow:
    """A workflow under construction."""

    name: str
    library: NodeLibrary
    nodes: list[Node] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    def node(
        self,
        kind: str,
        at: tuple[float, float],
        *,
        title: str | None = None,
        wide: float = 270,
        text_height: float = TEXT,
        tall: float = 0,
        **inputs: Any,
    ) -> Node:
        """Add a node of type ``kind``; ``inputs`` are values of widgets and :class:`Output` of other nodes."""
        schema = self.library.schema(kind)
        unknown = inputs.keys() - schema.inputs.keys()
        if unknown:
            raise ValueError(f"{kind} has no input {sorted(unknown)}")
        links = {name: value for name, value in inputs.items() if isinstance(value, Output)}
        values = {entry.name: inputs.get(entry.name, default_value(entry)) for entry in schema.widgets}
        sockets = sum(not entry.widget for entry in schema.inputs.values())
        height = ROW * max(sockets, len(schema.outputs)) + 6 + tall
        for entry in schema.widgets:
            height += text_height + 4 if entry.options.get("multiline") else WIDGET
            height += WIDGET * entry.hidden_slots
        made = Node(len(self.nodes) + len(self.notes) + 1, schema, title, at, (wide, height + 10), values, links)
        self.nodes.append(made)
        return made

    def note(self, text: str, at: tuple[float, float], size: tuple[float, float], *, title: str, chinese: str) -> None:
        """Add a note in Markdown; ``size`` is for ``text``, and what the Chinese below it needs is added at the top."""
        more = _room(chinese, size[0])
        self.notes.append(
            {
                "id": len(self.nodes) + len(self.notes) + 1,
                "type": "MarkdownNote",
                "pos": [at[0], at[1] - more],
                "size": [size[0], size[1] + more],
                "flags": {},
                "order": 0,
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "title": title,
                "properties": {},
                "widgets_values": [f"{text}\n\n{chinese}"],
                "color": "#432",
                "bgcolor": "#653",
            }
        )

    def group(self, title: str, nodes: list[Node], *, color: str = "#3f789e") -> None:
        """A frame around ``nodes``."""
        left, top = (min(node.position[axis] for node in nodes) for axis in (0, 1))
        right, bottom = (max(node.position[axis] + node.size[axis] for node in nodes) for axis in (0, 1))
        bounding = [left - 10, top - 74, right - left + 20, bottom - top + 84]
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": bounding,
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def editor(self) -> dict[str, Any]:
        """The workflow in the editor's format."""
        links: list[list[Any]] = []
        incoming: dict[tuple[int, str], int] = {}
        outgoing: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            for place, name in enumerate(self._slots(node)):
                if name in node.links:
                    origin = node.links[name]
                    number = len(links) + 1
                    links.append([number, origin.node.id, origin.slot, node.id, place, origin.kind])
                    incoming[node.id, name] = number
                    outgoing.setdefault((origin.node.id, origin.slot), []).append(number)
        nodes = [*self.notes, *(self._node(node, incoming, outgoing) for node in self.nodes)]
        nodes.sort(key=lambda node: node["id"])
        self._order(nodes, links)
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"latent_guidance/workflows/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes) + len(self.notes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": self._offset()}},
            "version": 0.4,
        }

    @staticmethod
    def _order(nodes: list[dict[str, Any]], links: list[list[Any]]) -> None:
        """Number the nodes as the editor does: what needs nothing first, then whatever has all it needs."""
        waiting = {node["id"]: sum(link[3] == node["id"] for link in links) for node in nodes}
        by_id = {node["id"]: node for node in nodes}
        ready = [number for number, count in waiting.items() if count == 0]
        for place, number in enumerate(ready):  # grows while it is walked through
            by_id[number]["order"] = place
            for link in sorted((link for link in links if link[1] == number), key=lambda link: link[2]):
                waiting[link[3]] -= 1
                if waiting[link[3]] == 0:
                    ready.append(link[3])

    def _offset(self) -> list[float]:
        corners = [group["bounding"][:2] for group in self.groups] + [note["pos"] for note in self.notes]
        return [60 - min(corner[0] for corner in corners), 100 - min(corner[1] for corner in corners)]

    @staticmethod
    def _slots(node: Node) -> list[str]:
        """Input slots in the editor's order: sockets first, then widgets."""
        entries = list(node.schema.inputs.values())
        return [e.name for e in entries if not e.widget] + [e.name for e in entries if e.widget]

    def _node(
        self,
        node: Node,
        incoming: dict[tuple[int, str], int],
        outgoing: dict[tuple[int, int], list[int]],
    ) -> dict[str, Any]:
        schema, inputs = node.schema, []
        for name in self._slots(node):
            entry = schema.inputs[name]
            slot: dict[str, Any] = {"name": name, "type": entry.kind}
            if not entry.required:
                slot["shape"] = 7
            if entry.widget:
                slot["widget"] = {"name": name}
            inputs.append({**slot, "link": incoming.get((node.id, name))})
        names = getattr(schema.cls, "RETURN_NAMES", None) or schema.outputs
        outputs = [
            {"name": name, "type": kind, "links": outgoing.get((node.id, i))}
            for i, (name, kind) in enumerate(zip(names, schema.outputs, strict=True))
        ]
        values: list[Any] = []
        for entry in schema.widgets:
            values += [node.values[entry.name], *["fixed", ""][: entry.hidden_slots]]
        if schema.upload_slot:
            values.append("image")
        described: dict[str, Any] = {
            "id": node.id,
            "type": schema.id,
            "pos": list(node.position),
            "size": list(node.size),
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
        }
        if node.title:
            described["title"] = node.title
        properties: dict[str, Any] = {"Node name for S&R": schema.id}
        if node.models:
            properties["models"] = node.models
        return {**described, "properties": properties, "widgets_values": values}

    def api(self) -> dict[str, Any]:
        """The workflow in the API format."""
        prompt = {}
        for node in self.nodes:
            inputs: dict[str, Any] = {name: value for name, value in node.values.items() if name not in node.links}
            inputs.update({name: [str(origin.node.id), origin.slot] for name, origin in node.links.items()})
            prompt[str(node.id)] = {
                "inputs": inputs,
                "class_type": node.schema.id,
                "_meta": {"title": node.title or node.schema.title},
            }
        return prompt

"""The pack in ComfyUI's own editor, as a user meets it: templates, a run, the labels on the loader, help in two languages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WAIT = 240_000
"""Milliseconds for the page and for a run on a slow machine; both end far earlier on a quick one."""
SCROLLS = 30
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.0.0",
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}
LISTEN = """() => {
    window.seen = [];
    for (const kind of ["executed", "execution_success", "execution_error"])
        window.app.api.addEventListener(kind, (event) => window.seen.push([kind, event.detail]));
}"""
SELECT = """(kind) => {
    const node = window.app.graph.nodes.find((node) => node.type === kind);
    window.app.canvas.selectNodes([node]);
    window.app.canvas.centerOnNode(node);
    window.app.canvas.setDirty(true, true);
}"""
CENTRE_TEXT = """(kind) => {
    const node = window.app.graph.nodes.find((node) => node.type === kind);
    return (node.widgets ?? []).map((widget) => [widget.name, String(widget.value)]);
}"""


class Editor:
    """A page with the editor, and what its console said of the pack."""

    def __init__(self, page: Any, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.complaints: list[str] = []
        page.set_default_timeout(WAIT)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self._note(str(error)))

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self._note(f"{message.text} {message.location}")

    def _note(self, text: str) -> None:
        if "latent_guidance" in text or "LG" in text:
            self.complaints.append(text)

    def open(self, server: Any, locale: str) -> None:
        server.post("/settings", {**SETTINGS, "Comfy.Locale": locale})
        self.page.goto(f"http://127.0.0.1:{server.port}/")
        self.page.wait_for_function(
            "() => window.app?.graph && window.app?.extensionManager && window.app.vueAppReady !== false"
        )
        self.page.wait_for_selector("[data-testid=queue-button]")
        self.page.evaluate(LISTEN)

    def show(self, name: str) -> None:
        """Take a screenshot."""
        self.page.screenshot(path=self.folder / f"{name}.png")

    def template(self, name: str) -> None:
        """Load one of the pack's workflows from the template browser."""
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text("latent_guidance", exact=True).first.click()
        card = self.page.locator(f"[data-testid=template-workflow-{name}]").first
        self.page.locator("[data-testid^=template-workflow-]").first.hover()
        for _ in range(SCROLLS):  # further cards come when the last is near, in the order of the server's disk
            if card.count():
                break
            self.page.mouse.wheel(0, 2000)
            self.page.wait_for_timeout(1000)
        card.click()
        self.page.wait_for_function("() => window.app.graph.nodes.some((node) => node.type.startsWith('LG'))")

    def run(self) -> dict[str, Any]:
        """Press Run; the message with the pictures that were saved."""
        self.page.locator("[data-testid=queue-button]").first.click()
        self.page.wait_for_function("() => window.seen.some(([kind]) => kind !== 'executed')")
        seen = self.page.evaluate("() => window.seen")
        assert seen[-1][0] == "execution_success", seen[-1]
        return next(detail for kind, detail in seen if kind == "executed" and detail["output"].get("images"))

    def help(self, kind: str) -> str:
        """What the help panel says of a node that is on the canvas."""
        self.page.evaluate(SELECT, kind)
        self.page.locator("[data-testid=info-button]").first.click()
        panel = self.page.locator(".node-help-content").first
        panel.locator("h2").first.wait_for()
        return panel.inner_text()


@pytest.fixture
def editor(browser: Any, tmp_path: Path) -> Iterator[Editor]:
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    yield Editor(context.new_page(), tmp_path)
    context.close()


def test_the_quickstart_runs_from_the_template_browser(editor: Editor, server: Any) -> None:
    editor.open(server, "en")
    editor.template("quickstart")
    editor.show("quickstart")
    [picture, *_] = editor.run()["output"]["images"]
    editor.show("quickstart done")
    assert server.picture(picture).std() > 0.05
    assert not editor.complaints


def test_the_loader_shows_the_labels_after_a_run(editor: Editor, server: Any) -> None:
    editor.open(server, "en")
    prompt = json.loads((Path(__file__).parents[2] / "workflows" / "classifier_guidance.json").read_text("utf-8"))
    editor.page.evaluate("(graph) => window.app.loadGraphData(graph)", prompt)
    editor.page.evaluate(
        """() => {
            for (const node of window.app.graph.nodes)
                for (const widget of node.widgets ?? []) {
                    if (["checkpoint", "classifier"].includes(widget.name)) widget.value = "tiny";
                    if (widget.name === "steps") widget.value = 3;
                }
        }"""
    )
    editor.run()
    editor.show("labels")
    texts = [text for _, text in editor.page.evaluate(CENTRE_TEXT, "LGLoadClassifier")]
    assert any("Flags" in text and "Symbols" in text for text in texts)
    assert not editor.complaints


@pytest.mark.parametrize(
    ("locale", "words"), [("en", ["Inputs", "Outputs", "empty prompt"]), ("zh", ["输入", "输出", "空提示词"])]
)
def test_the_help_panel_speaks_the_users_language(locale: str, words: list[str], editor: Editor, server: Any) -> None:
    editor.open(server, locale)
    prompt = json.loads((Path(__file__).parents[2] / "workflows" / "quickstart.json").read_text("utf-8"))
    editor.page.evaluate("(graph) => window.app.loadGraphData(graph)", prompt)
    text = editor.help("LGNullConditioning")
    editor.show(f"help {locale}")
    assert all(word in text for word in words), text
    assert not editor.complaints

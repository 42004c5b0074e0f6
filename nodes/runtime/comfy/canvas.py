"""What a running node shows of itself in the editor."""

from __future__ import annotations

import re
import sys

MOST = 20_000
"""Characters shown at most."""


def show_text(text: str) -> None:
    """Show ``text`` under the widgets of the node that is running, as ComfyUI's own Get Image Size does.

    The editor reads it as HTML with ``[[text|address]]`` for links, and labels come from files that strangers made: what would
    open a tag or a link is shown as another sign.
    """
    from comfy_execution.utils import get_executing_context

    program, context = sys.modules.get("server"), get_executing_context()  # not there when nodes run without a server
    server = None if program is None else getattr(program.PromptServer, "instance", None)
    if server is not None and context is not None:
        server.send_progress_text(re.sub(r"\[(?=\[)", "[ ", text[:MOST].replace("<", "‹")), context.node_id)

"""Links of the pages to files outside of docs/, which the site does not hold.

In the repository they are links; on the site SECURITY.md is a page, and every other one is shown as text.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """Called by MkDocs with the text of every page."""
    here = Path(config.docs_dir) / page.file.src_path

    def shown(match):
        text, link, anchor = match[1], match[2], match[3] or ""
        target = (here.parent / link).resolve()
        if target == ROOT / "SECURITY.md":
            up = "../" * page.file.src_path.count("/")
            return f"[{text}]({up}security.md{anchor})"
        if target.is_relative_to(config.docs_dir) or not target.exists():
            return match[0]  # MkDocs checks it
        return text

    return LINK.sub(shown, markdown)

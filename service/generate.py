"""Write the tables of the documents that are made of the code: `python service/generate.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from hvp_service.app.config import ServerConfig
from hvp_service.app.flags import descriptions, metavar, shown_default

DOCUMENTS = Path(__file__).parent.parent / "docs"
_BEGIN, _END = "<!-- made by `make pages` -->\n\n", "\n<!-- until here -->"


def settings_table() -> str:
    """One line for each setting of a server."""
    words = descriptions()
    lines = ["| setting | value | default | |", "|---|---|---|---|"]
    for name, field in ServerConfig.model_fields.items():
        value = metavar(name).replace("|", "\\|")
        cells = f"`{name}` | {value} | {shown_default(field)} | {words[name]}"
        lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


TABLES = {"configuration.md": settings_table}


def page(name: str) -> str:
    """A document with its table made anew."""
    text = (DOCUMENTS / name).read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{TABLES[name]()}{_END}{after}"


def generate(folder: Path) -> None:
    """Write the documents into a folder."""
    for name in TABLES:
        (folder / name).write_text(page(name))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENTS)

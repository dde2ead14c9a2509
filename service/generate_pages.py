"""Write the tables of documents that are made of the code: `python service/generate_pages.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from hvp_service.app.config import ServerConfig
from hvp_service.app.flags import descriptions, metavar, shown_default
from hvp_service.metrics import instruments, state
from prometheus_client import Counter, Gauge, Histogram

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


def metrics_table() -> str:
    """One line for each figure of a server."""
    found = {name: (labels, "gauge", words) for name, (words, labels) in state.FAMILIES.items()}
    for each in vars(instruments).values():
        if isinstance(each, (Counter, Gauge, Histogram)):
            (metric,) = each.describe()
            name = metric.name + ("_total" if metric.type == "counter" else "")
            found[name] = (each._labelnames, metric.type, metric.documentation)
    lines = ["| figure | labels | kind | |", "|---|---|---|---|"]
    for name, (labels, kind, words) in sorted(found.items()):
        lines.append(f"| `{name}` | {', '.join(labels)} | {kind} | {words} |")
    return "\n".join(lines) + "\n"


TABLES = {"configuration.md": settings_table, "metrics.md": metrics_table}


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

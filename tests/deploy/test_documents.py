"""What the documents of deploying point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("document", ["docs/deploying.md", "deploy/README.md"])
def test_links_lead_to_files_and_folders_that_exist(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert links
    assert not [each for each in links if not (path.parent / each).exists()]


def test_every_folder_of_deploy_is_in_both_tables() -> None:
    folders = {path.name for path in (ROOT / "deploy").iterdir() if path.is_dir()}
    for document in ("docs/deploying.md", "deploy/README.md"):
        text = (ROOT / document).read_text()
        assert {each for each in folders if f"{each}/" in text or f"/{each}]" in text} == folders

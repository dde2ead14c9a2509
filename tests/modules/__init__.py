"""A package as a user would install it: models of their own, registered by entry point.

`installed` writes its metadata, which `pip install` would.
"""

from __future__ import annotations

from pathlib import Path

_METADATA = "Metadata-Version: 2.1\nName: modules-of-a-user\nVersion: 1.0\n"
_FAMILIES = {
    "laplacian": "Laplacian",
    "scaled-mlp": "ScaledMlp",
    "own-mlp": "OwnMlp",
    "tied-mlp": "TiedMlp",
    "mlp-of-tokens-names": "OfTokensNames",
    "mlp-in-train-mode": "InTrainMode",
    "mlp-of-a-dict": "OfADict",
    "mlp-of-no-rows": "OfNoRows",
    "mlp-of-a-sum": "OfASum",
    "mlp-of-what-counts": "OfWhatCounts",
    "mlp-of-what-counts-unsaid": "OfWhatCountsUnsaid",
    "mlp-of-a-bent-loss": "OfBent",
    "mlp-that-raises": "ThatRaises",
    "mlp-of-a-spaced-name": "OfASpacedName",
    "mlp-of-a-strange-dimension": "OfAStrangeDimension",
    "missing": "NoSuchClass",
}


def installed(folder: Path) -> Path:
    """Make a folder that registers the families where it is on Python's path.

    Args:
        folder: Empty, or not there.

    Returns:
        The folder.
    """
    metadata = folder / "modules_of_a_user-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(_METADATA)
    lines = [f"{name} = modules_of_a_user:{cls}" for name, cls in _FAMILIES.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[hvp.families]", *lines]) + "\n")
    source = Path(__file__).with_name("families.py").read_text()
    (folder / "modules_of_a_user.py").write_text(source)
    return folder

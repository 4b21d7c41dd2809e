"""A shape without weights made servable: its config.json beside another model's tokenizer, filled up to its vocabulary.

    python3 bench/servable.py SHAPE_DIR TOKENIZER_DIR OUT_DIR

Owns the filler: ids that no text spells and that read `<123456>`, so that every id that made-up weights sample is text
that a client sees. Never makes weights; the engine does, for `random_weights` in config.json."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path, help="a folder with a config.json, as in bench/models/")
    parser.add_argument("tokenizer", type=Path, help="a folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    make(arguments.shape, arguments.tokenizer, arguments.out)
    print(arguments.out)


def make(shape: Path, tokenizer: Path, out: Path) -> None:
    """Write the folder. Raises ValueError where the shape's vocabulary is smaller than the tokenizer's."""
    config = json.loads((shape / "config.json").read_text(encoding="utf-8"))
    definition = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(filled(definition, config["vocab_size"])), encoding="utf-8")
    for source in (shape / "config.json", tokenizer / "tokenizer_config.json"):
        shutil.copy(source, out)


def filled(definition: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The tokenizer with an id for each of `vocab_size`; no merge leads to a new one, so no text is read otherwise."""
    # Marks outside the model's vocabulary are numbered behind it when read: here they keep their ids by being in it.
    marks = {mark["content"]: mark["id"] for mark in definition.get("added_tokens", ())}
    known = definition["model"]["vocab"] | marks
    taken = set(known.values())
    if max(taken) >= vocab_size:
        raise ValueError(f"the tokenizer has {max(taken) + 1} ids, the shape {vocab_size}")
    filler = {f"<{number}>": number for number in range(vocab_size) if number not in taken}
    return definition | {"model": definition["model"] | {"vocab": known | filler}}


if __name__ == "__main__":
    main()

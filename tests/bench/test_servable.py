"""A shape made servable: every id reads as text, and no text is read otherwise than before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import servable
from router.language.vocabulary import Detokeniser, Vocabulary
from tests.router.desk import tokenizer_json

SHAPE = {"vocab_size": 300, "random_weights": True}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One token a byte and two marks: ids below 258."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path / "shape"


def test_every_id_is_text_and_none_is_read_otherwise(shape: Path, model: Path, tmp_path: Path) -> None:
    servable.make(shape, model, tmp_path / "out")

    old, new = Vocabulary.load(model), Vocabulary.load(tmp_path / "out")
    texts = ["The lighthouse <299> blinked.", "<|im_start|>"]
    assert len(new) == SHAPE["vocab_size"]
    assert Detokeniser(new.tables).feed([258, 299]) == "<258><299>"
    assert new.encode_data(texts) == old.encode_data(texts)
    assert new.encode_marked(texts[1]) == old.encode_marked(texts[1])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == SHAPE


def test_a_vocabulary_too_small_is_refused(shape: Path, model: Path, tmp_path: Path) -> None:
    (shape / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 100}))

    with pytest.raises(ValueError, match="the tokenizer has 258 ids, the shape 100"):
        servable.make(shape, model, tmp_path / "out")

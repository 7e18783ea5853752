"""How many tokens a model has positions for: RoBERTa's kin begin to count behind the padding token's id."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as tf

from loftq.data.prepare import OFFSET_POSITIONS, positions
from loftq.data.tasks import TASKS

_SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
_SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 1}
_MORE = {
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 5},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 4},
    "luke": {"entity_vocab_size": 9, "entity_emb_size": 8},
    "xmod": {"default_language": "en_XX"},
}


def _trained_families() -> set[str]:
    """Model types that some task's class of model may have."""
    return {name for task in TASKS.values() for name in getattr(tf, task.model)._model_mapping._model_mapping}


def test_every_family_that_offsets_its_positions_is_known():
    """A new release of transformers may bring more: their code says it, as in ``padding_idx + 1``."""
    offset = re.compile(r"incremental_indices\.long\(\) \+ (self\.)?padding_idx|padding_idx \+ 1, sequence_length")
    table = re.compile(r"position_embeddings = [\w.]+\(\s*config\.max_position_embeddings")
    found = set()
    for path in Path(tf.__file__).parent.glob("models/*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if offset.search(text) and table.search(text):
            found.add(path.stem.removeprefix("modeling_").replace("_", "-"))
    families = {name for name in _trained_families() if name.replace("_", "-") in found}
    print(sorted(found), sorted(families))
    assert families == set(OFFSET_POSITIONS)


@pytest.mark.parametrize("family", OFFSET_POSITIONS)
def test_positions_are_all_that_the_embedding_has(family):
    config = tf.AutoConfig.for_model(family, **{**_SIZES, **_MORE.get(family, {})})
    model = tf.AutoModel.from_config(config).eval()
    limit = positions(config)
    assert limit == 18
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def test_a_half_with_a_text_config_of_its_own():
    """T5Gemma2's encoder also sees pictures."""
    text = {**_SIZES, "max_position_embeddings": 30}
    seen = {"hidden_size": 32, "num_attention_heads": 2}
    config = tf.T5Gemma2Config(
        encoder={"text_config": {**_SIZES, "num_key_value_heads": 2}, "vision_config": seen},
        decoder={**text, "num_key_value_heads": 2},
    )
    assert (positions(config), positions(config, writing=True)) == (20, 30)

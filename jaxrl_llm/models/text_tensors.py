"""Which tensors of a vision-language checkpoint read text, and what they are called in a text model."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Where the text part of a vision-language checkpoint may lie, in files of different ages.
_TEXT = re.compile(r"^(?:model\.language_model|language_model\.model)\.")
_OTHERS = "visual|vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector|mtp"
_OTHER_PARTS = re.compile(rf"^(?:model\.)?(?:{_OTHERS})\.")


def text_names(names: Iterable[str]) -> dict[str, str]:
    """What the tensors of a text model are called among those of a vision-language checkpoint, by our names.

    >>> text_names(["visual.blocks.0.weight", "model.language_model.norm.weight", "language_model.lm_head.weight"])
    {'model.norm.weight': 'model.language_model.norm.weight', 'lm_head.weight': 'language_model.lm_head.weight'}
    """
    return {
        _TEXT.sub("model.", name).removeprefix("language_model."): name
        for name in names
        if not _OTHER_PARTS.match(name)
    }

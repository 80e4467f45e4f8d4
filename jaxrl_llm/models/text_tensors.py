"""The tensors of the text model in a vision-language checkpoint, and their names in a text-only checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Prefixes of the text model in vision-language checkpoints, in newer and older files.
_TEXT = re.compile(r"^(?:model\.language_model|language_model\.model)\.")
_OTHERS = "visual|vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector|mtp"
_OTHER_PARTS = re.compile(rf"^(?:model\.)?(?:{_OTHERS})\.")


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a text-only checkpoint -> name in a vision-language checkpoint, for the tensors of the text model.

    >>> text_names(["visual.blocks.0.weight", "model.language_model.norm.weight", "language_model.lm_head.weight"])
    {'model.norm.weight': 'model.language_model.norm.weight', 'lm_head.weight': 'language_model.lm_head.weight'}
    """
    return {
        _TEXT.sub("model.", name).removeprefix("language_model."): name
        for name in names
        if not _OTHER_PARTS.match(name)
    }

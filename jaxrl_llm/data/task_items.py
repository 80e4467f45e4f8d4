"""The TFDS builder of synthetic tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_llm.data.builder import DataSpec, fingerprint
from jaxrl_llm.data.tasks.items import record


@dataclass(eq=False)
class TaskItemsConfig(tfds.core.BuilderConfig):
    """The TFDS configuration that carries a specification."""

    spec: DataSpec | None = None


class TaskItems(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of synthetic tasks; `data_set` is the usual way in."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look for checksums with a package that it does not require. Nothing is downloaded.
    code_path = None

    @property
    def spec(self) -> DataSpec:
        """The specification that the configuration carries."""
        config: Any = self.builder_config
        return config.spec

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = dict.fromkeys(("body", "think", "answer", "task", "domain"), tfds.features.Text())
        features |= dict.fromkeys(("level", "item_id"), tfds.features.Scalar(np.int64))
        return tfds.core.DatasetInfo(
            builder=self,
            description="Synthetic problems with reference scratch and answer.",
            features=tfds.features.FeaturesDict(features),
            # On disk in the order of item_id, so that source[i] is item i.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(spec=self.spec.canonical),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        spec = self.spec
        records = [record(item, number) for number, item in enumerate(spec.items())]
        # The metadata are written with the data, at the end.
        metadata: Any = self.info.metadata
        metadata["fingerprint"] = fingerprint(spec, records)
        return {spec.split: self._generate_examples(records)}

    def _generate_examples(self, records: Sequence[dict[str, Any]]):
        for fields in records:
            yield fields["item_id"], fields

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
    """The TFDS configuration with a specification."""

    spec: DataSpec | None = None


class TaskItems(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of synthetic tasks; `data_set` is the public function."""

    VERSION = tfds.core.Version("1.0.0")
    # With a code path TFDS would look for checksums, which needs a package that TFDS does not require.
    code_path = None

    @property
    def spec(self) -> DataSpec:
        """The specification in the configuration."""
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
        # TFDS writes the metadata after the data.
        metadata: Any = self.info.metadata
        metadata["fingerprint"] = fingerprint(spec, records)
        return {spec.split: self._generate_examples(records)}

    def _generate_examples(self, records: Sequence[dict[str, Any]]):
        for fields in records:
            yield fields["item_id"], fields

"""Reading of users' YAML: plain values of limited number and depth."""

from __future__ import annotations

from typing import Any

import yaml

from jaxrl_llm.bounds import shortened, shown

MOST_BYTES = 1_000_000
MOST_LEVELS = 50
MOST_VALUES = 50_000  # including the values repeated by aliases


class _Loader(yaml.SafeLoader):
    """Counts values, including those repeated by aliases; supports no tags and no dates."""

    def __init__(self, text: str):
        super().__init__(text)
        self.values, self.levels, self.sizes = 0, 0, {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, f"the tag {shown(event.tag)} is not supported", event.start_mark)
        before, alias = self.values, isinstance(event, yaml.AliasEvent)
        self.values, self.levels = self.values + 1, self.levels + 1
        if self.levels > MOST_LEVELS:
            raise yaml.MarkedYAMLError(None, None, f"more than {MOST_LEVELS} levels of nesting", event.start_mark)
        node = super().compose_node(parent, index)
        if alias and id(node) not in self.sizes:
            raise yaml.MarkedYAMLError(None, None, f"*{event.anchor} occurs inside its own anchor", event.start_mark)
        self.values += self.sizes[id(node)] if alias else 0
        if self.values > MOST_VALUES:
            raise yaml.MarkedYAMLError(None, None, f"more than {MOST_VALUES:,} values", event.start_mark)
        self.sizes[id(node)] = self.values - before
        self.levels -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.MarkedYAMLError(None, None, f"the key {shown(key.value)} occurs twice", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def yaml_values(text: str, where: str) -> Any:
    """The values of a YAML text.

    Args:
      text: content of a file, or the value of an override.
      where: name of the text in messages.

    Raises:
      ValueError: for invalid YAML, tags, duplicate keys, aliases inside their own anchors, more than 50 levels or
        50,000 values.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {shortened(str(error), 600)}") from None
    except (ValueError, OverflowError) as error:  # of Python's own numbers
        raise ValueError(f"{where} holds a number that cannot be read: {shortened(str(error))}") from None
    finally:
        if loader is not None:
            loader.dispose()

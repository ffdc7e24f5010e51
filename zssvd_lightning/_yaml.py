"""Checks of YAML text before it is loaded, with errors that name the line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

MOST_BYTES = 2**24
"""Maximum size of a file."""


DEEPEST = 50
"""Maximum nesting."""


MOST_NODES = 1_000_000
"""Maximum number of keys and values, each counted wherever an alias repeats it."""


MOST_DIGITS = 4000
"""Maximum number of digits of a whole number; Python reads no more than 4,300."""


TEXT, WHOLE, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "merge"))
"""Tags of text, of whole numbers and of the key `<<`."""


class UnfitYAMLError(ValueError):
    """Content that cannot be settings. The message begins with the line, if it is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem if line is None else f"line {line}: {problem}")


class Extent(NamedTuple):
    """Size of a node, with aliases replaced by what they stand for."""

    nodes: int
    depth: int


def read_yaml_text(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        UnfitYAMLError: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UnfitYAMLError(f"it has {size:,} bytes, but settings have at most {MOST_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise UnfitYAMLError(f"it cannot be read: {error}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnfitYAMLError(
            f"byte {content[error.start]:#04x} is not UTF-8; save the file as UTF-8 text", line
        ) from error


def check_yaml(text: str) -> Node | None:
    """Return the root of YAML text that can be loaded safely; None if the text is empty.

    Raises:
        UnfitYAMLError: the text is not YAML, has several documents, tags, or keys that are not text, refers to itself,
            or is nested too deeply or too large.
    """
    try:
        _check_events(text)
        root = yaml.compose(text, yaml.SafeLoader)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = error.character if isinstance(error.character, str) else chr(error.character)
        raise UnfitYAMLError(f"character {character!r} is not allowed in YAML", line) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UnfitYAMLError(error.problem or error.context or "not YAML", mark.line + 1 if mark else None) from error
    if root is not None:
        _extent(root, {})
    return root


def scalars(root: Node | None) -> Iterator[ScalarNode]:
    """Yield every value that is no collection, once, even if aliases repeat it."""
    waiting, seen = [] if root is None else [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, ScalarNode):
            yield node
        else:
            waiting += _children(node)


def line_of(node: Node) -> int:
    """Return the line of a node, from 1."""
    line: int = node.start_mark.line
    return line + 1


def _check_events(text: str) -> None:
    """Raise UnfitYAMLError for deep nesting and for tags. Unlike composing, this does not recurse."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = None if event.start_mark is None else event.start_mark.line + 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > DEEPEST:
            raise UnfitYAMLError(f"it is nested deeper than {DEEPEST} levels", line)
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag not in (None, "!", TEXT):
            raise UnfitYAMLError(f"the tag {event.tag!r} is not supported; write the value without a tag", line)
        if isinstance(event, AliasEvent) and depth == 0:
            raise UnfitYAMLError("an alias alone is no mapping", line)


def _extent(node: Node, known: dict[int, Extent | None]) -> Extent:
    """Check the keys, numbers and size of a node, and return its extent. `known` holds None for open nodes."""
    if id(node) in known:
        extent = known[id(node)]
        if extent is None:
            raise UnfitYAMLError("an alias refers to the collection that it is in", line_of(node))
        return extent
    known[id(node)] = None
    if isinstance(node, MappingNode):
        _check_keys([key for key, _ in node.value])
    if isinstance(node, ScalarNode) and node.tag == WHOLE and len(node.value) > MOST_DIGITS:
        raise UnfitYAMLError(f"a whole number of {len(node.value):,} digits is too large", line_of(node))
    parts = [_extent(child, known) for child in _children(node)]
    found = Extent(1 + sum(part.nodes for part in parts), 1 + max((part.depth for part in parts), default=0))
    if found.nodes > MOST_NODES:
        raise UnfitYAMLError(f"its aliases stand for more than {MOST_NODES:,} values", line_of(node))
    if found.depth > DEEPEST + 1:
        raise UnfitYAMLError(f"with its aliases, it is nested deeper than {DEEPEST} levels", line_of(node))
    known[id(node)] = found
    return found


def _check_keys(keys: Sequence[Node]) -> None:
    seen = set()
    for key in keys:
        if not isinstance(key, ScalarNode) or key.tag not in (TEXT, MERGE):
            shown = f"key {key.value!r}" if isinstance(key, ScalarNode) else "key is a collection and"
            raise UnfitYAMLError(
                f"the {shown} is not text; keys are names of settings, or text in quotes", line_of(key)
            )
        if key.tag == TEXT and key.value in seen:
            raise UnfitYAMLError(f"the key {key.value!r} is there twice; remove one", line_of(key))
        seen.add(key.value)


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []

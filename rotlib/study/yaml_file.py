"""YAML as recipes and scales are written: plain data, each name once, nothing that grows."""

import re
from pathlib import Path

import yaml

_MOST = 2**20  # characters
_DEEPEST = 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # six times as fast, where it was built
_POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}")


def read_yaml(path: Path) -> yaml.Node | None:
    """The root of a YAML file, None where it is empty.

    Raises ValueError naming the file for one that can't be read, isn't YAML, is longer than a
    mebibyte, nested deeply, or holds anchors: a few nested ones stand for gigabytes.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
    except (OSError, ValueError) as error:  # a name may be too long, or hold a null byte
        raise ValueError(f"{str(path)[:200]!r} can't be read: {error}") from error
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't text in UTF-8: {error.reason}") from error
    if len(text) > _MOST:
        raise ValueError(f"{path.name} is longer than {_MOST} characters: split it")
    try:
        _check_growth(path, text)
        root = yaml.compose(text, _LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} isn't valid YAML: {' '.join(str(error).split())}") from error
    _check_names(path, root)
    return root


def value_of(path: Path, node: yaml.Node) -> object:
    """What a node of the file stands for; raises ValueError naming file and line."""
    try:
        return _made_of(node)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # 2026-13-45 is a date to YAML
        raise ValueError(f"{place(path, node)}: {' '.join(str(error).split())}") from error


def place(path: Path, node: yaml.Node) -> str:
    """Where a node stands, such as "gsr.yaml, line 3"."""
    return f"{path.name}, line {node.start_mark.line + 1}"


def word_of(text: str) -> object:
    """What a single value means, as it would in a file; raises ValueError."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(node, yaml.ScalarNode | yaml.SequenceNode) or len(text) > 1000:
            raise ValueError("it is neither a word nor a number")
        if isinstance(node, yaml.ScalarNode) and not _plain(node):
            raise ValueError("it isn't a plain number")
        for part in [node] if isinstance(node, yaml.ScalarNode) else node.value:
            _read_power(part)
        return _made_of(node)
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{text[:50]!r} can't be read: {' '.join(str(error).split())}") from error


def _made_of(node: yaml.Node) -> object:
    return yaml.SafeLoader("").construct_document(node)


def _read_power(node: yaml.Node) -> None:
    """Make 1e-3 the number that it is; to YAML 1.1 it is a word."""
    if isinstance(node, yaml.ScalarNode) and not node.style and _POWER.fullmatch(node.value):
        node.tag = "tag:yaml.org,2002:float"


def _plain(node: yaml.ScalarNode) -> bool:
    """Not a number in octal or base 60, to YAML 1.1, nor one of more digits than Python reads."""
    number = node.tag.endswith(":int")
    return not (number and (re.match(r"[-+]?0\d|.*:", node.value) or len(node.value) > 1000))


def _check_growth(path: Path, text: str) -> None:
    """Raises ValueError for anchors and deep nesting, before anything is made of them."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        where = f"{path.name}, line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None):
            raise ValueError(
                f"{where}: anchors and aliases (& and *) aren't read: write the values out"
            )
        if getattr(event, "tag", None):
            raise ValueError(f"{where}: tags ({event.tag}) aren't read: write plain values")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"{where}: this is nested more than {_DEEPEST} deep")


def _check_names(path: Path, root: yaml.Node | None) -> None:
    """Raises ValueError for two entries of one name, of which YAML would take the last."""
    left = [root]
    while left:
        node = left.pop()
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        if isinstance(node, yaml.ScalarNode) and not _plain(node):
            raise ValueError(f"{place(path, node)}: write {node.value[:50]} as a plain number")
        _read_power(node)
        if not isinstance(node, yaml.MappingNode):
            continue
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{place(path, key)}: a name must be a word")
            if key.value in seen:
                raise ValueError(f"{place(path, key)}: {key.value} stands there a second time")
            seen.add(key.value)
            left.append(value)

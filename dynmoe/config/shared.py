"""One composition for all jobs of a sweep that differ in plain values alone.

A thousand jobs of `seed=range(100)` times ten settings are a few compositions: in each the keys
that jobs differ in are `Swept` values, which say who reads them. `once` keeps the result of a
function of the configuration beside the values that it has read, and computes it again only for
other ones. A result is therefore the same as that of a composition of its own.

Compositions that differ in one node, the mixture, share their results too: reading that node is
noticed as reading a swept value is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode

T = TypeVar("T")


class Values:
    """The values of the swept keys in the job at hand, and results by the values they have read."""

    def __init__(self) -> None:
        self._now: dict[str, Any] = {}
        self._texts: dict[str, str] = {}  # 1, 1.0, True and '1' are four values
        self._reads: list[set[str]] = []  # of the functions that run, the innermost last
        self._known: dict[Hashable, dict[tuple[str, ...], dict[tuple[str | None, ...], Any]]] = {}
        self.roots: dict[int, tuple[Hashable, str, DictConfig]] = {}
        """The configurations that the results are of, by their id: results of equal names are
        shared; the node that differs among those, if any; and the configuration itself."""

    def go_to(self, values: dict[str, Any]) -> None:
        """Let the configuration be that of another job."""
        self._now = values
        self._texts = {key: repr(value) for key, value in values.items()}

    def read(self, key: str) -> Any:
        if self._reads:
            self._reads[-1].add(key)
        return self._now[key]

    def once(self, place: Hashable, compute: Callable[[], T], reads: Collection[str]) -> T:
        known = self._known.setdefault(place, {})
        for keys, results in known.items():
            values = tuple([self._texts.get(key) for key in keys])  # None: of another mixture
            if values in results:
                if self._reads:
                    self._reads[-1].update(keys)
                found: T = results[values]
                return found
        with self.reading() as read:
            read.update(reads)
            result = compute()
        keys = tuple(sorted(read))
        known.setdefault(keys, {})[tuple([self._texts.get(key) for key in keys])] = result
        return result

    @contextmanager
    def reading(self) -> Iterator[set[str]]:
        """The keys that are read inside, which whoever is around has read as well."""
        self._reads.append(set())
        try:
            yield self._reads[-1]
        finally:
            read = self._reads.pop()
            if self._reads:
                self._reads[-1] |= read

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        before, self._reads = self._reads, []
        try:
            yield
        finally:
            self._reads = before


class Swept(AnyNode):
    """The value of a key that jobs differ in. Copies are of the same key, until they are set."""

    def __init__(self, values: Values, swept: str, node: AnyNode) -> None:
        self.__dict__["_own"] = None
        super().__init__(key=node._key(), parent=node._get_parent())
        self.__dict__.update(_values=values, _swept=swept, _own=None)

    @property
    def _val(self) -> Any:
        own = self.__dict__["_own"]
        return self.__dict__["_values"].read(self.__dict__["_swept"]) if own is None else own[0]

    @_val.setter
    def _val(self, value: Any) -> None:
        self.__dict__["_own"] = (value,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Swept:
        copied = Swept(self.__dict__["_values"], self.__dict__["_swept"], self)
        copied.__dict__["_own"] = self.__dict__["_own"]
        copied._metadata = self._metadata.__class__(**vars(self._metadata))
        return copied


class Watched(dict[Any, Any]):
    """The content of a configuration; reading `node` is noticed, and so is reading what Hydra says
    of its choice."""

    def __init__(self, values: Values, node: str, content: dict[Any, Any]) -> None:
        super().__init__(content)
        self._values, self._node = values, node

    def get(self, key: Any, default: Any = None) -> Any:
        if key in (self._node, "hydra"):
            self._values.read(self._node)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.get(key)
        return super().__getitem__(key)

    def values(self) -> Any:
        self.get(self._node)
        return super().values()

    def items(self) -> Any:
        self.get(self._node)
        return super().items()


_values: Values | None = None  # of the job at hand


def once(cfg: DictConfig, place: Hashable, compute: Callable[[], T]) -> T:
    """`compute()`, a function of `cfg` alone that `place` names; kept where jobs share `cfg`."""
    if _values is None:
        return compute()
    root, below = cfg, None
    while (above := root._get_parent()) is not None:
        root, below = above, root  # type: ignore[assignment]
    if id(root) not in _values.roots:
        return compute()
    name, node, _ = _values.roots[id(root)]
    inside = [node] if below is not None and below._key() == node else []
    return _values.once((name, place), compute, inside)


def is_shared(cfg: DictConfig) -> bool:
    """Whether several jobs are read from this configuration, the root."""
    return _values is not None and id(cfg) in _values.roots


def anew(cfg: DictConfig, place: Hashable, compute: Callable[[], T]) -> T:
    """`compute()`, in the place of `once` where results must not be kept."""
    return compute()


def unnoticed() -> AbstractContextManager[None]:
    """Inside, reading a swept value does not count: for results that are the same for any."""
    return nullcontext() if _values is None else _values.unnoticed()


class Keep(Protocol):
    """`once` or `anew`."""

    def __call__(self, cfg: DictConfig, place: Hashable, compute: Callable[[], T], /) -> T: ...


def derived(cfg: DictConfig, place: Hashable, make: Callable[[], DictConfig | None]) -> Any:
    """A configuration that `make` derives from `cfg`, with results of its own to keep."""

    def made() -> DictConfig | None:
        found = make()
        if found is not None and _values is not None and is_shared(cfg):
            _values.roots[id(found)] = id(found), "", found
        return found

    return once(cfg, place, made)


def copied(cfg: DictConfig, without: str, **instead: DictConfig) -> DictConfig:
    """A copy that lacks a key and has others `instead`. OmegaConf's own, masked_copy, would read
    the swept values."""
    found = OmegaConf.create()
    for key in cfg:
        if key != without:
            node: Any = instead.get(str(key)) or copy.deepcopy(cfg._get_node(key))
            node._set_parent(found)
            node._set_key(key)
            found._content[key] = node  # type: ignore[index]
    return found


class Shared(Generic[T]):
    """Compositions by the overrides that jobs do not share.

    `compose` makes one from overrides, `config` is its configuration, and `apart` the key of a node
    that nothing else in it follows from, if any.
    """

    def __init__(
        self,
        compose: Callable[[Sequence[Override]], T],
        config: Callable[[T], DictConfig],
        is_group: Callable[[str], bool],
        apart: Callable[[T], str] = lambda _: "",
    ) -> None:
        self._compose = compose
        self._config = config
        self._is_group = is_group
        self._apart = apart
        self._structure: set[str] = set()  # keys that are more than a value
        self._made: dict[Hashable, tuple[T, Values, dict[str, int]]] = {}
        self._values: dict[Hashable, Values] = {}

    @contextmanager
    def job(self, overrides: Sequence[Override]) -> Iterator[T]:
        """The composition of one job, which is only valid inside."""
        global _values
        swept = {each.key_or_group: each for each in self._swept(overrides)}
        composition, values, which = self._of(overrides, swept)
        values.go_to({key: each.value() for key, each in swept.items()} | which)
        before, _values = _values, values
        try:
            yield composition
        finally:
            _values = before

    def _of(
        self, overrides: Sequence[Override], swept: dict[str, Override]
    ) -> tuple[T, Values, dict[str, int]]:
        """A composition, the values in it, and its number beside the key of its node apart.

        Keys of `swept` that turn out to be more than a value are removed.
        """
        # In Hydra's order: of its own keys first.
        overrides = sorted(overrides, key=Override.is_hydra_override, reverse=True)
        while (place := _place(overrides, swept)) not in self._made:
            composition = self._compose(overrides)
            cfg = self._config(composition)
            nodes = {key: _leaf(cfg, each) for key, each in swept.items()}
            unfit = [key for key, node in nodes.items() if node is None]
            if not unfit:
                self._made[place] = composition, *self._watched(composition, overrides, nodes)
            self._structure.update(unfit)
            for key in unfit:
                del swept[key]
        return self._made[place]

    def _watched(
        self, composition: T, overrides: Sequence[Override], nodes: dict[str, Any]
    ) -> tuple[Values, dict[str, int]]:
        """Let what is swept in a composition say who reads it."""
        cfg, apart = self._config(composition), self._apart(composition)
        values, which = Values(), dict[str, int]()
        if apart:
            rest = [each for each in overrides if not _is_below(each.key_or_group, apart)]
            outside = {key for key in nodes if not _is_below(key, apart)}
            values = self._values.setdefault(_place(rest, outside), values)
            which = {apart: len(self._made)}
        for key, node in nodes.items():
            parent, name = node._get_parent(), node._key()
            parent._content[name] = Swept(values, key, node)
        if apart:
            cfg.__dict__["_content"] = Watched(values, apart, cfg.__dict__["_content"])
        values.roots[id(cfg)] = "", apart, cfg
        return values, which

    def _swept(self, overrides: Sequence[Override]) -> list[Override]:
        keys = Counter(each.key_or_group for each in overrides)
        above = tuple(f"{key}." for key in keys if not self._is_group(key))
        return [
            each
            for each in overrides
            if each.key_or_group not in self._structure
            and _is_plain(each)
            and keys[each.key_or_group] == 1
            # A mapping that is given as well: the later of the two counts.
            and not each.key_or_group.startswith(above)
            and not self._is_group(each.key_or_group)
        ]


def _place(overrides: Sequence[Override], swept: Collection[str]) -> Hashable:
    """The same for all overrides that differ in the values of swept keys alone."""
    lines = [str(each.input_line) for each in overrides if each.key_or_group not in swept]
    # `++key=value` is how a command's `key=value` reaches Hydra.
    return *(line.removeprefix("++") for line in lines), tuple(sorted(swept))


def _is_below(key: str, node: str) -> bool:
    return f"{key}.".startswith(f"{node}.")


PLAIN = (OverrideType.CHANGE, OverrideType.ADD, OverrideType.FORCE_ADD)

# Hydra's own keys, and those that earlier stages are made by.
STRUCTURE = ("hydra", "mode", "name", "paths", "stage")


def _is_plain(override: Override) -> bool:
    """Whether it sets one value: no list, mapping, null or interpolation."""
    value = override._value
    if isinstance(value, QuotedString):
        value = value.text
    if isinstance(value, str) and ("$" in value or "\\" in value or value == "???"):
        return False
    return (
        override.type in PLAIN
        and override.package is None
        and override.key_or_group.partition(".")[0] not in STRUCTURE
        and isinstance(value, bool | int | float | str)
    )


def _leaf(cfg: DictConfig, override: Override) -> AnyNode | None:
    """The value that an override has set; None if it has done more, or nothing."""
    above, _, name = override.key_or_group.rpartition(".")
    try:
        parent = OmegaConf.select(cfg, above) if above else cfg
    except OmegaConfBaseException:
        return None
    node: Any = parent._get_node(name) if isinstance(parent, DictConfig) else None
    given = override.value()
    fits = type(node) is AnyNode and repr(node._value()) == repr(given)
    return node if fits and _is_at(cfg, override.key_or_group, node) else None


def _is_at(cfg: DictConfig, key: str, node: AnyNode) -> bool:
    """Whether the key is the place of the node itself, and not of one that refers to it."""
    return node._get_full_key("") == key and node._get_root() is cfg

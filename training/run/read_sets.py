"""The data sets of a run, in the versions that its epochs read."""

from functools import cache
from typing import Any

from core.errors import InputError
from core.storage.store import open_store
from data_pipeline.config import OrderConfig
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.split import splits_at
from data_pipeline.streaming.order import LaneOrder
from data_pipeline.streaming.reads import PlaceAt

_SPLIT = "train"
Versions = list[tuple[int, str]]
"""(first epoch, fingerprint) of the versions that a run reads; "" = the newest."""


class ReadSet:
    """One data set of a run."""

    def __init__(
        self, kind: Any, place: str, versions: Versions, seed: int, batch: int, config: OrderConfig
    ) -> None:
        """`kind`: RawSource or TokenSource; the others are those of `LaneOrder`."""
        self.place = place
        self._kind, self._store, self._versions = kind, open_store(place), versions
        self._order = seed, batch, config

    def source_at(self, epoch: int) -> Any:
        """The train split that an epoch reads."""
        return self._source(self._name_at(epoch))

    def order_at(self, epoch: int) -> LaneOrder:
        """The order of an epoch."""
        return self._order_of(self._name_at(epoch))

    def find(self, text: str) -> PlaceAt:
        """The place of a pair, given by its id or key, in each epoch.

        Raises: InputError if no version of the train split has it.
        """
        places, missing = {}, None
        for _, name in self._versions:
            try:
                places[name] = find_pair(self._store, _SPLIT, self._source(name).blocks, text)
            except InputError as error:
                missing = error
        if missing is not None and not places:
            raise missing
        return lambda epoch: places.get(self._name_at(epoch))

    def holds_out(self, text: str) -> bool:
        """True if the validation split has a pair."""
        held_out = self._kind(self._store, "validation")
        try:
            find_pair(self._store, "validation", held_out.blocks, text)
        except InputError:
            return False
        return True

    def _name_at(self, epoch: int) -> str:
        return [name for first, name in self._versions if first <= epoch][-1]

    @cache  # noqa: B019 - lives as long as its command
    def _source(self, fingerprint: str) -> Any:
        kind = self._kind
        opened = splits_at(self._store, kind.kind, fingerprint)[_SPLIT] if fingerprint else None
        return kind(self._store, _SPLIT, opened=opened)

    @cache  # noqa: B019 - as above
    def _order_of(self, fingerprint: str) -> LaneOrder:
        return LaneOrder(self._source(fingerprint).sizes, *self._order)

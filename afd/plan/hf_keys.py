"""The keys of a Hugging Face config.json under the many names that families give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afd.errors import ConfigError


class Keys:
    """A config's keys under their many names; a missing one is an error that names the file and the names tried."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self._config = config
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._config.get(key) is not None

    def value(self, *names: str) -> Any:
        """The first name that is set, None when none is."""
        return next((self._config[name] for name in names if self._config.get(name) is not None), None)

    def integer(self, *names: str, default: int | None = None) -> int:
        """The first name that is set, as an integer >= 0; `default` or an error when none is."""
        value = self.value(*names)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.where}: needs {' or '.join(names)}")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self.where}: {names[0]} must be a number >= 0, found {value!r}")
        return value

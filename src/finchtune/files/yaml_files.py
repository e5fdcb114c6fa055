"""YAML files: plain values only, without what could unfold a small file to a large one."""

from pathlib import Path
from typing import Any

from finchtune.errors import UserError


def read_yaml(path: str | Path) -> Any:
    """Read YAML without aliases; UserError names the file if it is missing, broken or has some."""
    import yaml  # slow to import

    class PlainLoader(yaml.SafeLoader):
        """Refuses `*name`, by which ten lines can stand for a billion values."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read")
            return super().compose_node(parent, index)

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), PlainLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, TypeError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error

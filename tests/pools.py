"""A configuration of several pools and replicas, in front of fake engines or of none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from tests.fakes import FakeLlamaServer


def written(
    folder: Path,
    pools: Mapping[str, Mapping[str, FakeLlamaServer | str]],
    *,
    self_test: bool = False,
    **more: dict[str, Any],
) -> Path:
    """The file with these engines by pool and replica, the first pool the default one; more keys of each."""
    tables = {
        name: {
            "default": number == 0,
            "self_test": self_test,
            "replicas": [
                {"id": replica_id, "endpoint": at if isinstance(at, str) else at.url}
                | more.get(replica_id, {})
                for replica_id, at in replicas.items()
            ],
        }
        for number, (name, replicas) in enumerate(pools.items())
    }
    file = folder / "pools.toml"
    file.write_text(tomli_w.dumps({"pools": tables}))
    return file

from collections.abc import Mapping, Set
from typing import Any

from kbusd.supervisor.aside import Aside

class Ready:
    def __init__(self, epoll: int) -> None: ...
    def serve(
        self, devices: Any, aside: Aside, handlers: Mapping[int, Any], slow: Set[Any]
    ) -> None: ...

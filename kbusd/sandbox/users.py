"""Which of the users that profiles speak of there are in our user namespace (user_namespaces(7))."""

from __future__ import annotations

from kbusd.sandbox.compiled import FEW_USERS, USERS


def there(many: int | None, few: int | None) -> tuple[int, int] | None:
    """The first and how many: the 65536 from `many` on, else the 256 from `few` on, else nobody."""
    with open("/proc/self/uid_map") as mapped:
        ranges = [tuple(map(int, line.split())) for line in mapped]
    for first, count in ((many, USERS), (few, FEW_USERS)):
        if first and any(at <= first and first + count <= at + size for at, _, size in ranges):
            return first, count
    return None

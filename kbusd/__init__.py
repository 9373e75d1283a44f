"""kbusd: a D-Bus message bus in userland, one confined process per client."""

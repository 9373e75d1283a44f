"""The `kbusctl` command: looks at a running bus from outside."""

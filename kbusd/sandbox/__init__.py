"""Profile -> confinement of the calling process.

`profiles` reads profiles/*.toml, `compile` turns one into a value that needs no more look-ups,
`apply` takes the calling process into it, `inforce` reads back from the kernel what came of it.
Only `profiles` and `compile` read files; `apply` imports nothing that the others need.
"""

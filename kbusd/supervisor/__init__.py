"""The privileged part: listens, starts and ends processes, hands descriptors over.

It reads nothing that a client wrote. What it trusts: its command line, what the confined config
reader made of the configuration, the kernel.
"""

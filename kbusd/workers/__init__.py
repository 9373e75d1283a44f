"""The processes that serve one client each, and the zygote that they are forked from."""

"""The one unprivileged process that knows names, match rules and policy of the whole bus."""

"""Where a rule that is proposed for a profile goes: the admin's own file, which may be there already."""

from __future__ import annotations

from kbusd.sandbox import profiles


def place(profile: profiles.Profile) -> tuple[str, list[str]]:
    """The file, with what to do with it, and the lines that it needs before any rules."""
    own = profiles.OVERRIDES / f"{profile.name}.toml"
    if profile.files[0] == str(own):
        return f"{own}, to be added to what is there", []
    head = [f'extends = "{profile.name}"', 'why = "..."', "[seccomp]", 'why = "..."']
    return f"{own}, which may say only", head

"""Code that must not get out: a policy's programs run without network, files or secrets of the machine.

Read first: `sandbox` (what one asks for), `limits` (what a run may use, how it ends), then `zygotes` (how a run is
started) and one kind of isolation: `confinement` for the jail, `bubblewrap`, `container`.
"""

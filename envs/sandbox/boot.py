"""How the interpreter of a zygote is started, whatever is around it."""

BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from envs.sandbox.jail_child import main; del sys.path[0]; main()"
)
FLAGS = ("-P", "-s", "-S")
"""No user's and no site's packages. Not -I, which would ignore the hash seed that keeps transcripts the same."""
ENVIRONMENT = {"PYTHONHASHSEED": "0"}

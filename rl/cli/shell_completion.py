"""`shoal completion SHELL`: a script for the shell, and the words it asks for while somebody types.

The scripts hold no list of their own: they call `shoal completion words LINE`, which knows today's commands, settings,
environments and runs.
"""

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable, Sequence
from pathlib import Path

from rl.cli.command import CommandTable, parser_of

BASH = """\
# shoal completion bash > ~/.local/share/bash-completion/completions/shoal
_shoal() {
    local line="${COMP_LINE:0:COMP_POINT}" prefix="" candidates
    candidates="$("$1" completion words "$line" 2>/dev/null)" || return
    local word="${line##*[[:space:]]}"
    case "$COMP_WORDBREAKS" in *=*) case "$word" in *=*) prefix="${word%=*}=" ;; esac ;; esac
    COMPREPLY=()
    while IFS= read -r candidate; do
        [ -n "$candidate" ] && COMPREPLY+=("${candidate#"$prefix"}")
    done <<< "$candidates"
    case "${COMPREPLY[0]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _shoal shoal
"""
ZSH = """\
#compdef shoal
# shoal completion zsh > a folder of $fpath, as _shoal
_shoal() {
    local -a candidates
    candidates=("${(@f)$("${words[1]}" completion words "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    candidates=(${candidates:#})
    (( ${#candidates} )) || { _files; return }
    compadd -S '' -- ${(M)candidates:#*=}
    compadd -- ${candidates:#*=}
}
if [ "${funcstack[1]}" = _shoal ]; then _shoal "$@"; else compdef _shoal shoal; fi
"""
FISH = """\
# shoal completion fish > ~/.config/fish/completions/shoal.fish
function __shoal_words
    set -l found (command shoal completion words (commandline -cp | string collect) 2>/dev/null)
    test -n "$found"; and printf '%s\\n' $found; or __fish_complete_path (commandline -ct)
end
complete -c shoal -f -a '(__shoal_words)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def candidates(line: str, table: CommandTable) -> list[str]:
    """Words that may stand where `line` ends, e.g. "shoal sh" -> ["show"]; those already begun only."""
    _, *done, word = [*line.split(), *([""] if line[-1:].isspace() else [])] or [""]
    command, program = table, "shoal"
    while isinstance(command, CommandTable):
        if not done:
            return _begun(word, command.commands)
        name, *done = done
        if name not in command.commands:
            return []
        command, program = command.commands[name], f"{program} {name}"
    parser = parser_of(program, command)
    if word.startswith("-"):
        return _begun(word, (name for name, action in parser._option_string_actions.items() if action.help != SUPPRESS))
    return _begun(word, _values(parser, done, word))


def _values(parser: ArgumentParser, done: Sequence[str], word: str) -> Iterable[str]:
    """What the arguments without a dash may be. An option's own value is left to the shell, which knows files."""
    if done and done[-1].startswith("-") and _takes_value(parser, done[-1]):
        return
    for action in parser._actions:
        if action.option_strings:
            continue
        if action.metavar == "RUN":
            yield from _runs(done)
        elif action.metavar == "ID":
            yield from _environments()
        elif action.metavar == "PART":
            from rl.cli.readers.export import PARTS

            yield from PARTS
        elif action.dest == "overrides":
            yield from _settings(word)
        elif action.choices:
            yield from map(str, action.choices)


def _takes_value(parser: ArgumentParser, option: str) -> bool:
    action = parser._option_string_actions.get(option)
    return action is not None and action.nargs != 0


def _runs(done: Sequence[str]) -> Iterable[str]:
    from rl.runs.run_folder import LATEST, list_runs

    root = done[done.index("--root") + 1] if "--root" in done[:-1] else "runs"
    yield from (LATEST, *(run.name for run in list_runs(Path(root))))


def _environments() -> Iterable[str]:
    from envs.registry import list_envs

    yield from list_envs()


def _settings(word: str) -> Iterable[str]:
    """ "key=" of every setting, and "group=name" once a group or a setting with a fixed choice is named."""
    from conf.checks import CHOICES
    from conf.keys import leaf_keys
    from conf.loading import GROUPS, options_of
    from conf.schema import TrainConfig

    key, equals, _ = word.partition("=")
    if not equals:
        yield from (f"{name}=" for name in (*GROUPS, *leaf_keys(TrainConfig())))
    elif key in GROUPS:
        yield from (f"{key}={name}" for name in options_of(key))
    else:
        yield from (f"{key}={name}" for name in CHOICES.get(key, ()))


def _begun(word: str, options: Iterable[str]) -> list[str]:
    return [option for option in dict.fromkeys(options) if option.startswith(word)]

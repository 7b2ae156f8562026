"""All commands as one: `latentwire train ...` is `python -m latentwire_fast.train ...`.

    latentwire --help                    # the commands
    latentwire train --help              # the options of one
    latentwire --version
    latentwire completion bash           # a script by which the shell completes all of this

Where nothing is installed, `python -m latentwire_fast` stands for `latentwire`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from latentwire_fast import __version__

# Command: the class of its arguments. The command's module has its name, and a function `main`.
COMMANDS = {
    "train": "TrainArguments",
    "evaluate": "RunArguments",
    "encode": "EncodeArguments",
    "generate": "GenerateArguments",
    "sweep": "SweepArguments",
    "repack": "RepackArguments",
    "train_text_lora": "TextLoraArguments",
}
SHELLS = ("bash", "zsh")


def main() -> None:
    """What the command line asks for; without a command, the help and status 2."""
    command, *arguments = sys.argv[1:] or ["--help"]
    name = command.replace("-", "_")
    if command in ("-h", "--help"):
        say(help_text() + "\n")
        sys.exit(0 if sys.argv[1:] else 2)
    elif command == "--version":
        print(f"latentwire {__version__}")
    elif command == "completion":
        if len(arguments) != 1 or arguments[0] not in SHELLS:
            mistake(f"completion takes the name of a shell: {' or '.join(SHELLS)}")
        say(completion_script(arguments[0]))
    elif name in COMMANDS:
        sys.argv = [f"latentwire {command}", *arguments]
        module = importlib.import_module(f"{__package__}.{name}")
        module.run_entry_point(module.main)  # as its last line does
    else:
        mistake(f"no command {command!r}; there are {', '.join(typed_names())}")


def say(text: str) -> None:
    """Print all of it; a pager or `head` that ends before it is no error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def typed_names() -> list[str]:
    """The commands as they are typed."""
    return [*(name.replace("_", "-") for name in COMMANDS), "completion"]


def mistake(message: str) -> NoReturn:
    """End with one line and status 2, as the commands do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --- the help -------------------------------------------------------------------------------------


def help_text() -> str:
    """The commands, each with the first sentence of its module."""
    lines = [*map(summary, COMMANDS), "Print a script by which bash or zsh completes all of this."]
    names = typed_names()
    width = max(map(len, names))
    return "\n".join(
        [
            "usage: latentwire COMMAND ...",
            "       latentwire COMMAND --help | --help | --version",
            "",
            "One prompt as a payload of a few hundred bytes, read by many frozen LLMs.",
            "",
            *(f"  {name:<{width}}  {line}" for name, line in zip(names, lines, strict=True)),
        ]
    )


def summary(command: str) -> str:
    """The first paragraph of a command's module, which is read and not imported."""
    spec = importlib.util.find_spec(f"{__package__}.{command}")
    assert spec is not None, command
    text = ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ")


# --- completion -----------------------------------------------------------------------------------

_FOR_ZSH = "autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit\n"
# Where no word fits, `-o default` offers files.
_SCRIPT = """\
_latentwire() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}} $before $word" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _latentwire latentwire
"""


def completion_script(shell: str) -> str:
    """The script of one of `SHELLS`, which reads it when it starts: commands, options, the words
    that an option takes, and names of files."""
    cases = []
    for command, typed in zip(COMMANDS, typed_names(), strict=False):
        known = dict(options(arguments_of(command)))
        for option, words in known.items():
            if words:
                cases.append(f'      "{typed} {option} "*) words="{" ".join(words)}" ;;')
        cases.append(f'      "{typed} "*" -"*) words="{" ".join(known)} --help" ;;')
    cases.append(f'      "completion completion "*) words="{" ".join(SHELLS)}" ;;')
    commands = " ".join([*typed_names(), "--help", "--version"])
    script = _SCRIPT.format(commands=commands, cases="\n".join(cases))
    return (_FOR_ZSH if shell == "zsh" else "") + script


def arguments_of(command: str) -> type:
    """The dataclass of a command's arguments."""
    module = importlib.import_module(f"{__package__}.{command}")
    kind: type = getattr(module, COMMANDS[command])
    return kind


def options(kind: type) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The options of a command, each with the words that it takes, where these are a few."""
    import tyro

    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        notes = getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Positional in notes:
            continue
        given = [name for note in notes if (name := getattr(note, "name", None))]  # conf.arg
        name = str(given[0]) if given else field.name
        yield f"--{name.replace('_', '-')}", _words(hints[field.name])


def _words(hint: Any) -> tuple[str, ...]:
    """The words of a `Literal`, also within `Annotated` and beside None."""
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
        return tuple(word for part in inner for word in _words(part))
    return ()


if __name__ == "__main__":
    main()

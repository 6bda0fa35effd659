"""The `opsin` command: finds the sub-command, checks its options, and turns mistakes into one sentence."""

import functools
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import tyro
import yaml

import opsin
from opsin import ranks
from opsin.backbone.registry import architecture
from opsin.commands import COMMANDS, FROM_RECIPE, launch_slurm
from opsin.curate.recipe import read as read_curation
from opsin.curation_commands import curate
from opsin.data.decode import shown
from opsin.errors import OpsinError, unknown
from opsin.memory import keep_freed_memory
from opsin.pretrain.presets import CONTINUED, DISTILL, preset
from opsin.pretrain.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit status: 0, 2 after a mistake of the user's, 128 + n after signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    try:
        status = _run(arguments)
    except ranks.ElsewhereError:
        status = 2
    except OpsinError as error:
        who = "opsin" if ranks.first() else f"opsin, process {ranks.rank()} of {ranks.count()}"
        print(f"{who}: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has what it wanted
        status = 0
    except OSError as error:  # a full disk, a name that is too long: what no command has a better word for
        if ranks.together() or error.strerror is None:
            raise
        place = f" {shown(error.filename)}" if isinstance(error.filename, str) else ""
        print(f"opsin: the system refuses{place or ' a file'}: {error.strerror}.", file=sys.stderr)
        status = 2
    except Exception:
        if not ranks.together():
            raise
        traceback.print_exc()  # and then out at once, below: the others notice it by this process being gone
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as end:  # of tyro, after help or a value that does not fit
        status = int(end.code or 0)
    try:
        sys.stdout.flush()  # here, because at exit a closed pipe would be told as an error
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # After a mistake, leaving in order would wait for processes that may be gone; after a signal, it would take the
    # interpreter from under the threads of Daft, which end the process as if it had crashed.
    if ranks.together() or (status > 128 and "daft" in sys.modules):
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: list[str]) -> int:
    if "" in arguments:
        raise OpsinError("an option has an empty value: leave it out, or give it one.")
    if arguments[:1] == ["--version"]:
        print(f"opsin {opsin.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"{opsin.__doc__}\n\nusage: opsin COMMAND [options], opsin COMMAND --help\n")
        for name, command in COMMANDS.items():
            print(f"  {name:14} {(command.__doc__ or '').splitlines()[0]}")
        return 0
    if tasks := _group(arguments):
        print(f"usage: opsin {' '.join(arguments[:-1])} TASK [options], opsin {' '.join(arguments[:-1])} TASK --help\n")
        for name in tasks:
            print(f"  {name.partition(' ')[2]:14} {(COMMANDS[name].__doc__ or '').splitlines()[0]}")
        return 0
    return _checked(arguments)()


def _group(arguments: list[str]) -> list[str]:
    """The commands of a group whose help is asked for, as in `opsin evaluate --help`; none for anything else."""
    if len(arguments) != 2 or arguments[1] not in ("-h", "--help") or arguments[0] in COMMANDS:
        return []
    return [name for name in COMMANDS if name.startswith(arguments[0] + " ")]


def _checked(arguments: list[str]) -> functools.partial[int]:
    """A command with its options, all of which fit, not yet called."""
    name, rest = _command(arguments)
    command = COMMANDS[name]
    if name == "launch slurm":
        rest, command = _launched(rest)
    if name in FROM_RECIPE:
        settings, rest = _settings(name, rest)
        command = FROM_RECIPE[name](settings)
    if name == "curate" and (given := _value_of("--recipe", rest)) is not None:
        command = curate(read_curation(Path(given)))
    known, required = [], []
    for option, parameter in inspect.signature(command).parameters.items():
        option = option.replace("_", "-")
        known += _dotted(parameter.default) if is_dataclass(parameter.default) else [option]
        required += [option] if parameter.default is inspect.Parameter.empty else []
        required = ["data"] * (getattr(parameter.default, "data", None) == "") + required  # of an evaluation's settings
    if not {"-h", "--help"} & set(rest):
        _check_options(name, rest, set(known), required)
    checked: functools.partial[int] = tyro.cli(_called_later(command), prog=f"opsin {name}", args=rest)
    return checked


def _settings(name: str, arguments: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe of a command, from what must be known before its fields become options; and the other options."""
    init, weights = _value_of("--init", arguments), _value_of("--weights", arguments)
    if name == "pretrain" and init is not None and _value_of("--recipe", arguments) is None:
        arguments = ["--recipe", CONTINUED, *arguments]
    if name == "pretrain" and weights is not None and _value_of("--recipe", arguments) is None and init is None:
        raise OpsinError(
            "--weights needs --init NAME, the architecture of the file, or a --recipe whose backbone it fits."
        )
    settings = preset(_value_of("--recipe", arguments) or (DISTILL if name == "distill" else "cpu"))
    if init is not None:
        if weights is None:
            raise OpsinError(
                f"--init {init} names an architecture: give --weights PATH with it, the file of its weights."
            )
        settings = replace(settings, backbone=architecture(init))
    return _with_phases(settings, arguments)


def _with_phases(settings: Recipe, arguments: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe with what options such as --phases.high-res.schedule.rate change in its phases; and the others.

    Raises:
        OpsinError: there is no such phase, or a field is given for the whole run although phases change it.
    """
    phases = {phase.name: phase for phase in settings.phases}
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        option, _, value = word.partition("=")
        if not option.startswith("--phases."):
            rest.append(word)
            if option == "--steps" and phases and all(phase.length for phase in phases.values()):
                raise OpsinError(
                    f"every phase of this recipe has a length of its own, so --steps would say nothing: give "
                    f"--phases.{next(iter(phases))}.length '500 steps', and so for the others."
                )
            changing = [phase for phase in phases.values() if option[2:].replace("-", "_") in phase.change]
            if option.startswith("--") and changing:
                raise OpsinError(
                    f"{option} is changed by phase {changing[0].name}, so one value would not hold for the whole run: "
                    f"give --phases.{changing[0].name}.{option[2:]}."
                )
            continue
        name, _, field = option.removeprefix("--phases.").partition(".")
        if name not in phases:
            raise unknown("phase", name, list(phases))
        values = [value] if "=" in word else []
        while "=" not in word and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if not field or not "".join(values):
            raise OpsinError(f"{option} needs a field and a value, such as --phases.{name}.length '500 steps'.")
        if field == "length":
            phases[name] = replace(phases[name], length=" ".join(values))
        elif field == "fresh":
            phases[name] = replace(phases[name], fresh=cast(Any, tuple(values)))
        else:
            read = [yaml.safe_load(text) for text in values]
            change = {**phases[name].change, field.replace("-", "_"): read if len(read) > 1 else read[0]}
            phases[name] = replace(phases[name], change=change)
    return replace(settings, phases=tuple(phases.values())), rest


def _called_later(command: Callable[..., int]) -> Callable[..., functools.partial[int]]:
    @functools.wraps(command)
    def later(**options: Any) -> functools.partial[int]:
        return functools.partial(command, **options)

    return later


def _launched(arguments: list[str]) -> tuple[list[str], Callable[..., int]]:
    """The options of `launch slurm`, and it for the command after --, which is checked as if it ran here."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, words = arguments[:at], arguments[at + 1 :]
    if {"-h", "--help"} & set(own):
        return own, launch_slurm()
    if not words:
        raise OpsinError(
            "opsin launch slurm needs the command to run after --: opsin launch slurm --nodes 2 --gpus 8 -- pretrain "
            "--recipe vitl14 --data images --out runs/vitl14."
        )
    if _command(words)[0] == "launch slurm":
        raise OpsinError("a launched command cannot launch another: give one launch slurm, and then -- once.")
    return own, launch_slurm(words, _checked(words).keywords)


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the command, of one word or two, and its options."""
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            _check_task(name, arguments[words:])
            return name, arguments[words:]
    given = " ".join(word for word in arguments[:2] if not word.startswith("-"))
    tasks = [name for name in COMMANDS if name.startswith(given + " ")]
    if tasks:
        raise OpsinError(f"opsin {given} needs a task: opsin {', opsin '.join(tasks)}.")
    raise unknown("command", given or arguments[0], COMMANDS)


def _check_task(name: str, rest: list[str]) -> None:
    """Name a mistyped task of a command that does something without one, too."""
    tasks = [each.removeprefix(name + " ") for each in COMMANDS if each.startswith(name + " ")]
    if tasks and rest and not rest[0].startswith("-"):
        raise unknown(f"task of opsin {name}", rest[0], tasks)


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The value of an option that must be known before the others can be read."""
    for at, argument in enumerate(arguments):
        if argument == option and at + 1 < len(arguments):
            return arguments[at + 1]
        if argument.startswith(option + "="):
            return argument.partition("=")[2]
    return None


def _check_options(command: str, arguments: list[str], known: set[str], required: list[str]) -> None:
    """Name an unknown option together with the nearest known one, and a missing one, in one sentence each."""
    given = [a[2:].partition("=")[0].replace("_", "-") for a in arguments if a.startswith("--")]
    for name in given:
        # a flag is switched off by no- before its last part: --no-report, --data.no-upsample
        if name not in known and re.sub(r"(^|\.)no-", r"\1", name) not in known:
            raise unknown("option", "--" + name, ["--help", *("--" + k for k in known)])
    missing = [name for name in required if name not in given]
    if missing:
        needed = " and ".join(f"--{name}" for name in missing)
        raise OpsinError(f"opsin {command} needs {needed}: see opsin {command} --help.")


def _dotted(tree: Any, prefix: str = "") -> list[str]:
    names = []
    for f in fields(tree):
        value, name = getattr(tree, f.name), prefix + f.name.replace("_", "-")
        names += _dotted(value, name + ".") if is_dataclass(value) else [name]
    return names


if __name__ == "__main__":
    sys.exit(main())

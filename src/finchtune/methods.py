"""Which adapter methods there are, and their flags: read off their files, without importing them.

Importing a method takes torch, for which `--help` should not wait.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("adapters") / "methods"
TYPES = {"int": int, "int | None": int, "float": float, "bool": bool, "str": str}
"""What a hyperparameter of this annotation is on the command line."""


@dataclass(frozen=True)
class MethodFlag:
    """A flag that sets a hyperparameter of one or several methods."""

    hyperparameter: str
    methods: tuple[str, ...]
    type: type
    default: Any
    help: str
    choices: tuple[str, ...]
    at_least_one: bool


@dataclass(frozen=True)
class MethodFile:
    """A method as its file declares it."""

    module: str
    flags: dict[str, MethodFlag]
    training_flags: tuple[str, ...]


@functools.cache
def method_files() -> dict[str, MethodFile]:
    """Every method by its name, in the order of the files' names."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and "name" in (facts := class_facts(node)):
                flags = dict(flags_of(node, facts))
                found[facts["name"]] = MethodFile(path.stem, flags, facts.get("training_flags", ()))
    return found


def class_facts(node: ast.ClassDef) -> dict[str, Any]:
    """The attributes of a class whose values are written out."""
    facts = {}
    for statement in node.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(target, ast.Name):
            try:
                facts[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
            except ValueError:  # computed when the class is made
                continue
    return facts


def flags_of(node: ast.ClassDef, facts: dict[str, Any]) -> Iterator[tuple[str, MethodFlag]]:
    """(flag, what it sets) for each keyword-only argument of a method's constructor."""
    name = facts["name"]
    for function in node.body:
        if not isinstance(function, ast.FunctionDef) or function.name != "__init__":
            continue
        arguments = function.args
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            key = argument.arg
            flag = facts.get("flags", {}).get(key, f"{name}_{key}")
            if not flag:
                continue
            assert argument.annotation is not None, f"{name}: {key} has no annotation"
            assert default is not None, f"{name}: {key} has no default"
            annotation = ast.unparse(argument.annotation)
            yield (
                flag,
                MethodFlag(
                    key,
                    (name,),
                    TYPES[annotation],
                    TYPES[annotation](ast.literal_eval(default)),
                    facts.get("help", {}).get(key, key),
                    facts.get("choices", {}).get(key, ()),
                    at_least_one=annotation == "int",
                ),
            )


@functools.cache
def method_flags() -> dict[str, MethodFlag]:
    """Every flag of a method; one that several methods share stands once."""
    found: dict[str, MethodFlag] = {}
    for file in method_files().values():
        for flag, own in file.flags.items():
            shared = found.get(flag, replace(own, methods=()))
            found[flag] = replace(shared, methods=shared.methods + own.methods)
            assert own.default == shared.default, f"--{flag} has two defaults"
    return found


@functools.cache
def flag_methods() -> dict[str, tuple[str, ...]]:
    """Flag -> the methods that it goes with, for flags that do not go with every method."""
    found = {flag: own.methods for flag, own in method_flags().items()}
    for name, file in method_files().items():
        for flag in file.training_flags:
            found[flag] = (*found.get(flag, ()), name)
    # The method that gave the flag its name comes first.
    return {
        flag: tuple(sorted(names, key=lambda name: (not flag.startswith(name), name)))
        for flag, names in found.items()
    }

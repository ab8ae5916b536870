"""What an argument may be: rules that are checked where it is given, before any work.

A rule is a function ``(name, value) -> value``: it returns the value, made plain (a NumPy integer
becomes an int), or raises an `ArgumentError` that says what to give. `checked` puts a table of
rules before a function.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np

from lightning_hessian.results.base import ArgumentError

Rule: TypeAlias = Callable[[str, Any], Any]
Rules: TypeAlias = Mapping[str, Rule]

_P = ParamSpec("_P")
_R = TypeVar("_R")

OTHERS = "**"
"""In a table: names behind ``**`` without a rule go on to somebody else's function."""

MOST_SEED = 2**32 - 1
"""The largest seed that Python, NumPy and torch all take; negative ones NumPy does not take."""


# Where rules are applied -------------------------------------------------------------------------


def checked(
    rules: Rules,
    together: Callable[[Mapping[str, Any]], AbstractContextManager[Any]] | None = None,
    bridge: Callable[..., None] | None = None,
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that checks the arguments of every call by their rules.

    Defaults go through their rules too, so that the function gets the same form of a value
    whether it was given or not. Names behind ``**`` are looked up like the others, and a name
    without a rule is refused with those that there are.

    Args:
        rules: Name of an argument to its rule. It may hold more names than the function has; a
            test finds arguments without a rule.
        together: Given the arguments, returns a block in which they are checked, for a function
            that several processes call at once: what breaks a rule on one is then told by all.
        bridge: Given the function's name, its signature, and the arguments as they were written,
            raises where the call is written as another library's, before any rule.

    Example:
        >>> @checked({"count": whole_number(least=1)})
        ... def double(count):
        ...     return 2 * count
        >>> double(np.int64(3))
        6
        >>> double("3")
        Traceback (most recent call last):
        lightning_hessian.results.base.ArgumentError: count='3' cannot be used. Give a whole...
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError:  # else Python's own message says best which argument is missing
                if bridge is not None:
                    bridge(function.__name__, signature, args, kwargs)
                return function(*args, **kwargs)
            given.apply_defaults()
            with nullcontext() if together is None else together(given.arguments):
                if bridge is not None:
                    bridge(function.__name__, signature, args, kwargs)
                for name, value in given.arguments.items():
                    if kinds[name] is inspect.Parameter.VAR_KEYWORD:
                        given.arguments[name] = _rest(value, rules)
                    elif name in rules:
                        given.arguments[name] = rules[name](name, value)
            return function(*given.args, **given.kwargs)

        call.rules = {name: rules.get(name) for name in kinds}  # type: ignore[attr-defined]
        return call

    return decorate


def anything(name: str, value: Any) -> Any:
    """Take anything: the rule of what cannot be wrong."""
    return value


def _rest(given: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """Return what was given behind ``**``, checked."""
    for name, value in given.items():
        if name not in rules and OTHERS not in rules:
            raise ArgumentError(name, value, f"There is no such argument. {_choice(rules)}")
    return {name: rules.get(name, anything)(name, value) for name, value in given.items()}


def check_fields(record: Any, rules: Rules) -> None:
    """Check the fields of a dataclass, frozen or not, in ``__post_init__``, and make them plain."""
    for name, rule in rules.items():
        object.__setattr__(record, name, rule(name, getattr(record, name)))


def renamed(name: str, rule: Rule) -> Rule:
    """Return the rule with another name in its message, where users know the value by that."""
    return lambda _, value: rule(name, value)


def optional(rule: Rule, otherwise: str = "") -> Rule:
    """Return the rule with None allowed; what None stands for, "for no limit", ends the remedy."""

    def check(name: str, value: Any) -> Any:
        if value is None:
            return None
        try:
            return rule(name, value)
        except ArgumentError as error:
            if not otherwise:
                raise
            raise ArgumentError(name, value, f"{error.remedy} None is {otherwise}.") from None

    return check


def instance_of(kind: type, remedy: str, otherwise: object = None) -> Rule:
    """Return the rule of an instance of a class; None is for ``otherwise``, where it is given."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, kind):
            return value
        if value is None and otherwise is not None:
            return otherwise
        raise ArgumentError(name, value, remedy)

    return check


# Numbers -----------------------------------------------------------------------------------------


def whole_number(*, least: int = 0, most: int | None = None, because: str = "") -> Rule:
    """Return the rule of a count: an int or NumPy integer within bounds, and no bool.

    ``because`` is a further sentence for the remedy.
    """
    ends = f"of at least {least}" if most is None else f"from {least} to {most:,}"
    remedy = f"Give a whole number {ends}.{' ' if because else ''}{because}"

    def check(name: str, value: Any) -> int:
        count = _as_int(value)
        if count is not None and count >= least and (most is None or count <= most):
            return count
        raise ArgumentError(name, value, remedy)

    return check


def _as_int(value: Any) -> int | None:
    """Return what Python takes for an index as an int, None for anything else and for bools."""
    if isinstance(value, (bool, np.bool_)) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real_number(
    remedy: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Rule:
    """Return the rule of a finite real number within bounds; a bool is none."""

    def check(name: str, value: Any) -> float:
        number = as_float(value)
        if number is not None and above < number < below and least <= number <= most:
            return value if type(value) in (int, float) else number
        raise ArgumentError(name, value, remedy)

    return check


def as_float(value: Any) -> float | None:
    """Return a real number as a float, None for what is none or is not finite."""
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


seed_number = whole_number(most=MOST_SEED)
"""The rule of a seed."""

seconds = real_number("Give a finite number of seconds from 0 on.", least=0.0)
"""The rule of a time limit; 0 means that time is up at once."""

tolerance = real_number(
    "Give a relative tolerance between 0 and 1, such as 1e-3.", above=0.0, below=1.0
)
"""The rule of ``tol``: at 1 and above every pair would have converged."""

significance_level = real_number(
    "It is not strictly between 0 and 1; give a level such as 0.05.", above=0.0, below=1.0
)
"""The rule of ``significance``."""

memory = real_number("Give a finite number of bytes above 0, such as 2e9.", above=0.0)
"""The rule of a memory budget."""

live_interval = real_number("Give a finite number of seconds above 0.", above=0.0)
"""The rule of the seconds between two readings of a run."""

num_workers = whole_number(least=1, most=4096)
"""The rule of a number of processes."""


def row_choice(name: str, value: Any) -> Any:
    """Check ``at``, the row that stands for a run: a word, or a step."""
    if isinstance(value, str) and value in ("last", "best"):
        return value
    return real_number("Give 'last', 'best', or a step from 0 on.", least=0.0)(name, value)


def whole_numbers(*, least: int) -> Rule:
    """Return the rule of several whole numbers; returns a list."""
    one = whole_number(least=least)

    def check(name: str, value: Any) -> list[int]:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise ArgumentError(name, value, f"Give whole numbers of at least {least}.")
        return [one(name, number) for number in value]

    return check


# Words and functions -----------------------------------------------------------------------------


def flag(name: str, value: Any) -> bool:
    """Check a switch: True or False, and nothing that is only as good as one."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ArgumentError(name, value, "Give True or False.")


def one_of(*choices: str | None) -> Rule:
    """Return the rule of a word from a list."""

    def check(name: str, value: Any) -> Any:
        if (value is None or isinstance(value, str)) and value in choices:
            return value
        raise ArgumentError(name, value, _choice(choices))

    return check


def _choice(choices: Iterable[Any]) -> str:
    return f"Choose from {', '.join(map(repr, choices))}."


def nonempty_text(name: str, value: Any) -> str:
    """Check a word or name that is not empty."""
    if isinstance(value, str) and value.strip():
        return value
    raise ArgumentError(name, value, "Give a text that is not empty.")


def texts(remedy: str, *, empty: bool = False) -> Rule:
    """Return the rule of a text or a sequence of texts, none empty; returns a tuple.

    ``empty`` says whether there may be none.
    """

    def check(name: str, value: Any) -> tuple[str, ...]:
        found = (value,) if isinstance(value, str) else value
        if not is_collection(found) or not (empty or len(found)):
            raise ArgumentError(name, value, remedy)
        if not all(isinstance(one, str) and one.strip() for one in found):
            raise ArgumentError(name, value, remedy)
        return tuple(sorted(found) if isinstance(found, (set, frozenset)) else found)

    return check


def is_collection(value: Any) -> bool:
    """Return whether a value is a list, tuple or set of things, not a text or a mapping."""
    return isinstance(value, (Sequence, set, frozenset)) and not isinstance(
        value, (str, bytes, bytearray, memoryview)
    )


monitor_names = texts("Give the name of a logged metric such as 'val_loss', or a list of names.")
"""The rule of ``monitor``."""


def function_of(*parameters: str, returns: str = "") -> Rule:
    """Return the rule of a callable that can be called with these positional arguments.

    A callable without a readable signature (some built-ins) passes.
    """
    call = f"({', '.join(parameters)}){f' -> {returns}' if returns else ''}"

    def check(name: str, value: Any) -> Any:
        if not callable(value):
            raise ArgumentError(name, value, f"It is not callable; give {name}{call}.")
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):
            return value
        try:
            signature.bind(*parameters)
        except TypeError as error:
            raise ArgumentError(
                name, value, f"It does not take {call}: {error}. Give {name}{call}."
            ) from None
        return value

    return check


progress_function = function_of("num_products", "num_converged")
"""The rule of ``on_progress``."""


def glob(name: str, value: Any) -> Any:
    """Check a pattern: a glob, ``"re:<expression>"`` or a compiled expression."""
    if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
        return value
    if not isinstance(value, str) or not value:
        raise ArgumentError(
            name, value, "Give a glob such as '*.weight', 're:<expression>', or a list of them."
        )
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise ArgumentError(name, value, f"It is no regular expression: {error}.") from None
    return value

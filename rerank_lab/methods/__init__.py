"""The registry of methods. To add one, write a file here, a line in METHODS, and a test."""

from __future__ import annotations

from rerank_lab.errors import UserError
from rerank_lab.methods.best import Best
from rerank_lab.methods.fast import Fast
from rerank_lab.methods.maxsim import MaxSim
from rerank_lab.methods.method import Method, Setting, Value, setting, settings_of, shown
from rerank_lab.methods.optimal import Optimal
from rerank_lab.methods.pool import DROPPED, Pool
from rerank_lab.methods.standard import Standard

METHODS: dict[str, type[Method]] = {m.name: m for m in (Fast, Standard, Optimal, Best, MaxSim)}
CROSS_SUFFIX = "+cross"  # best+cross is the row of best with a cross-encoder, best the row without

__all__ = [
    "CROSS_SUFFIX", "DROPPED", "METHODS", "Method", "Pool", "Setting", "Value", "as_method", "labels", "make_method", "setting", "settings_of", "shown",
]  # fmt: skip


def labels() -> dict[str, str]:
    """Label → description of every row that a table can have without settings: each method, and NAME+cross if its cross-encoder is optional."""
    found = {}
    for name, kind in METHODS.items():
        found[name] = kind.about
        if kind.optional_cross:
            found[name + CROSS_SUFFIX] = kind.about_cross
    return found


def as_method(given: str | Method) -> Method:
    """Returns a method as it is, or makes it from its spec.

    Raises:
        UserError: as make_method, or the argument is neither a spec nor a Method.
    """
    if isinstance(given, str):
        return make_method(given)
    if not isinstance(given, Method):
        raise UserError(f"method must be one of {', '.join(METHODS)}, with settings as in 'best:tau=0.05', not {given!r}")
    return given


def make_method(spec: str, **defaults: Value) -> Method:
    """Makes a method from its name and settings: "best", "best:tau=0.05:gamma=0.25".

    Args:
        spec: NAME[:SETTING=VALUE]…
        defaults: values of settings that the spec does not name. Settings that the method lacks are ignored.

    Raises:
        UserError: the method or a setting is unknown, or a value is invalid; the message lists what is valid.
    """
    if any(character.isspace() for character in spec):
        raise UserError(f"method {spec!r} holds white space; write NAME:SETTING=VALUE")
    name, *parts = spec.split(":")
    if name not in METHODS:
        raise UserError(f"method {name!r} is not known; valid: {', '.join(METHODS)}")
    kind = METHODS[name]
    declared = settings_of(kind)
    settings, given = {key: value for key, value in defaults.items() if key in declared}, set[str]()
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in declared:
            valid = f"valid: {', '.join(declared)}" if declared else "it has none"
            raise UserError(f"method {spec!r}: {part!r} is no setting of {name} ({valid}; written {name}:SETTING=VALUE)")
        if key in given:
            raise UserError(f"method {spec!r}: {key} stands there twice")
        given.add(key)
        try:
            settings[key] = declared[key].parse(value)
        except ValueError:
            raise UserError(f"method {spec!r}: {key} takes {declared[key].takes}, not {value!r}") from None
    try:
        return kind(**settings)
    except ValueError as error:
        raise UserError(f"method {spec!r}: {error}") from None

"""The label of a row, parsed once: NAME[+cross][:SETTING=VALUE…], or endpoint:URL[:NAME[+cross]] for a server's row.

All other code asks a System. No other file parses a label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from rerank_lab.client.endpoint import URL_PATTERN, address_wanted, check_address, is_secret, sent_settings
from rerank_lab.errors import UserError
from rerank_lab.methods import CROSS_SUFFIX, METHODS, Method, Value, labels, make_method

SERVER = "endpoint"


@dataclass(frozen=True)
class System:
    """A method as one row runs it.

    Attributes:
        label: the row's name, as given on the command line.
        name: the method's name, with +cross if the cross-encoder joins it: fast, best, best+cross.
        settings: as in the label, each with its colon: ":tau=0.05"; "": none.
        server: address of the v3 server that runs the method; None: it runs here.
        top_k: number of candidates for a query. A method may derive the depth of its stage 1 from it; None: the method's default.
    """

    label: str
    name: str
    settings: str = ""
    server: str | None = None
    top_k: int | None = None

    @classmethod
    def parse(cls, label: str, top_k: int | None = None) -> System:
        """Parses a label. Whether the method exists is checked later, when `method` is first read.

        Raises:
            UserError: a server's label has no address, or a method or settings that v3 does not know.
        """
        prefix, _, rest = label.partition(":")
        if prefix != SERVER:
            name, colon, settings = label.partition(":")
            return cls(label, name, colon + settings, None, top_k)
        found = None if is_secret(rest) else re.fullmatch(rf"{URL_PATTERN}(?P<method>:.*)?", rest)
        if found is None:
            raise UserError(f"{address_wanted(rest, 'method endpoint')}; a row is endpoint:URL[:METHOD], as in endpoint:http://127.0.0.1:8000:best")
        url, name = check_address(found["address"], "method endpoint"), (found["method"] or ":fast")[1:]
        if name not in names():
            hint = "; v3 takes no settings" if name.partition(":")[0] in names() else ""
            raise UserError(f"method {label!r}: {name!r} is none that v3 knows; valid: {', '.join(names())}{hint}")
        return cls(label, name, "", url, top_k)

    @cached_property
    def method(self) -> Method:
        """The method with its effective settings.

        Raises:
            UserError: as make_method.
        """
        base = self.base
        share = METHODS[base].stage1_share if base in METHODS else None
        defaults = {} if share is None or self.top_k is None else {"stage1_top_k": max(1, int(self.top_k * share))}
        return make_method(base + self.settings, **defaults)

    @property
    def base(self) -> str:
        """The method's name without +cross."""
        name = self.name.removesuffix(CROSS_SUFFIX)
        return name if name in METHODS and METHODS[name].optional_cross else self.name

    @property
    def crossed(self) -> bool:
        """Whether the row runs the cross-encoder."""
        return self.base != self.name or (self.base in METHODS and "cross-encoder" in METHODS[self.base].roles)

    @property
    def remote(self) -> bool:
        """Whether a server runs the row."""
        return self.server is not None

    def recorded(self, max_tokens_per_doc: int) -> dict[str, Value]:
        """The row's settings as results have them: all of its method's, or those that a request to its server carries."""
        return sent_settings(self.method, max_tokens_per_doc) if self.remote else self.method.settings()

    @property
    def twin(self) -> str:
        """The label of the row that runs the same method here. For a row that runs here, its own label."""
        return self.name if self.remote else self.label


def names(cross: bool = True) -> list[str]:
    """Names of all systems without settings; cross=False leaves out those that run the cross-encoder."""
    return [name for name in labels() if cross or not System(name, name).crossed]

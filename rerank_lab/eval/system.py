"""A row of the table, taken apart once: NAME[+cross][:SETTING=VALUE…], or endpoint:URL[:NAME[+cross]] for a server's.

Everything else asks a System; no other file looks into a label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from rerank_lab.client.endpoint import ADDRESS, address_wanted, check_address, is_secret
from rerank_lab.errors import UserError
from rerank_lab.methods import CROSS_SUFFIX, METHODS, Method, labels, make_method

SERVER = "endpoint"


@dataclass(frozen=True)
class System:
    """A method as one row runs it.

    Attributes:
        label: names the row, as it was asked for.
        name: of the method, with +cross where that joins it: fast, best, best+cross.
        settings: as the label gives them, each with its colon: ":tau=0.05"; "" for none.
        server: the address of the v3 server that runs it; None: it runs here.
        top_k: candidates a query, from which a method may take the depth of its first stage; None: its own default.
    """

    label: str
    name: str
    settings: str = ""
    server: str | None = None
    top_k: int | None = None

    @classmethod
    def parse(cls, label: str, top_k: int | None = None) -> System:
        """Takes a label apart; whether there is such a method shows when `method` is asked for.

        Raises:
            UserError: a server's without an address, or with a method or settings that v3 does not know.
        """
        prefix, _, rest = label.partition(":")
        if prefix != SERVER:
            name, colon, settings = label.partition(":")
            return cls(label, name, colon + settings, None, top_k)
        found = None if is_secret(rest) else re.fullmatch(rf"{ADDRESS}(?P<method>:.*)?", rest)
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
        """The method's own name: best of best+cross."""
        name = self.name.removesuffix(CROSS_SUFFIX)
        return name if name in METHODS and METHODS[name].optional_cross else self.name

    @property
    def crossed(self) -> bool:
        """Whether it runs the cross-encoder."""
        return self.base != self.name or (self.base in METHODS and "cross-encoder" in METHODS[self.base].roles)

    @property
    def remote(self) -> bool:
        """Whether a server runs it."""
        return self.server is not None

    @property
    def twin(self) -> str:
        """The label of the row that does the same here; its own where it runs here."""
        return self.name if self.remote else self.label


def names(cross: bool = True) -> list[str]:
    """Names of all systems without settings; with cross=False, of those that run no cross-encoder."""
    return [name for name in labels() if cross or not System(name, name).crossed]

"""Rows of tokens: tables of experts whose vocabulary is longer or shorter than the base's, and the union of all.

V        rows of the base's tables
A_i      tokens that expert i's tokenizer has and the base's has not, by their text
tables   embeddings, the output layer where it is not tied, and its bias: a row (an entry) for each token
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def tables_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """A model's tables by the names of their parameters, tied ones once."""
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = [model.get_input_embeddings().weight, getattr(output, "weight", None), getattr(output, "bias", None)]
    return {name: p for name, p in model.named_parameters() if any(p is each for each in found)}


def rows_of(model: PreTrainedModel) -> int:
    """Rows of a model's embeddings."""
    table: Any = model.get_input_embeddings().weight
    return len(table)


def resize_(model: PreTrainedModel, rows: int) -> None:
    """Give a model's tables so many rows; new ones are zero."""
    before = rows_of(model)
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for table in tables_of(model).values():
                table[before:] = 0


def fit_(expert: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Give an expert's tables the rows of the base's, with a note on what is left out or filled in.

    Rows beyond the base's are of tokens of the expert's own, which no task may use; rows that the expert lacks must be
    of no token at all (tables are often padded), and are the base's.

    Args:
        expert: whose tables are changed.
        base: theta_pre.
        tokenizer: of the base, or the union.
        where: the expert's files, for messages.

    Raises:
        InputError: the expert lacks rows of tokens.
    """
    ours, theirs = rows_of(expert), rows_of(base)
    if ours == theirs:
        return
    name = next(iter(tables_of(expert)))
    if ours > theirs:
        logger.warning(
            "%s: %s has %d rows more than the base's, for tokens of its own; they are left out",
            where,
            name,
            ours - theirs,
        )
        resize_(expert, theirs)
        return
    last = max(tokenizer.get_vocab().values())
    if last >= ours:
        raise InputError(
            f"{name} has {ours} rows, and the base's tokenizer has a token of id {last}",
            where=where,
            hint="Name the base that this expert was fine-tuned from, or train the expert with the base's tokenizer",
        )
    logger.warning(
        "%s: %s has %d rows fewer than the base's, of no token; they are filled with the base's",
        where,
        name,
        theirs - ours,
    )
    resize_(expert, theirs)
    _take_rows_(expert, base, range(ours, theirs))


def _take_rows_(expert: PreTrainedModel, base: PreTrainedModel, rows: Iterable[int]) -> None:
    """Put rows of the base into the expert's tables."""
    places, tables = torch.tensor(list(rows)), tables_of(base)
    with torch.no_grad():
        for name, table in tables_of(expert).items():
            if name in tables:
                table[places] = tables[name][places].to(table.dtype)


@dataclass
class Union:
    """The base's vocabulary with every expert's added tokens, each with its own rows.

    A token that several experts have added has the mean of their rows. What is added is scaled by no coefficient: the
    base has nothing there that could be interpolated.

    Attributes:
        tokenizer: of all.
        ids: of the added tokens, by their text.
        own: by expert, its own ids of the tokens that it has added.
        rows: by table, by added id, the rows that experts bring.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: dict[str, int]
    own: dict[str, dict[str, int]]
    rows: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, experts: Mapping[str, PreTrainedTokenizerBase]) -> Union:
        """The union of a base's tokenizer, which gains tokens, and those of experts, in their order.

        Args:
            tokenizer: the base's.
            experts: by name.
        """
        known, own = tokenizer.get_vocab(), {}
        for name, theirs in experts.items():
            added = sorted(theirs.get_added_vocab().items(), key=lambda entry: entry[1])
            own[name] = {token: number for token, number in added if token not in known}
            for token, number in own[name].items():
                if token not in tokenizer.get_vocab():
                    how = theirs.added_tokens_decoder.get(number, token)
                    tokenizer.add_tokens([how], special_tokens=bool(getattr(how, "special", False)))
        vocabulary = tokenizer.get_vocab()
        tokens = dict.fromkeys(token for added in own.values() for token in added)
        return cls(tokenizer, {token: vocabulary[token] for token in tokens}, own)

    def grow_(self, base: PreTrainedModel) -> None:
        """Give the base's tables rows for all tokens."""
        resize_(base, max([rows_of(base), *(number + 1 for number in self.ids.values())]))

    def take_(self, name: str, expert: PreTrainedModel, base: PreTrainedModel, *, where: str) -> None:
        """Keep an expert's rows of the tokens that it has added, and give its tables the rows of the base's.

        Args:
            name: of the expert.
            expert: whose tables are changed.
            base: with rows for all tokens.
            where: the expert's files, for messages.

        Raises:
            InputError: the expert has no rows for its own tokens.
        """
        own = self.own.get(name, {})
        if own and max(own.values()) >= rows_of(expert):
            token = max(own, key=own.__getitem__)
            rows = rows_of(expert)
            raise InputError(
                f"its tokenizer has the token {token!r} of id {own[token]}, and its embeddings have {rows} rows",
                where=where,
                hint="Save the model after resize_token_embeddings(len(tokenizer)), or remove the token",
            )
        for table, parameter in tables_of(expert).items():
            kept = self.rows.setdefault(table, {})
            for token, number in own.items():
                kept.setdefault(self.ids[token], []).append(parameter.detach()[number].clone())
        before = rows_of(expert)
        resize_(expert, rows_of(base))
        _take_rows_(expert, base, sorted({*self.ids.values(), *range(before, rows_of(base))}))

    def fill_(self, base: PreTrainedModel) -> None:
        """Put what the experts have brought into the base's tables, when all have been taken."""
        with torch.no_grad():
            for name, table in tables_of(base).items():
                for number, rows in self.rows.get(name, {}).items():
                    table[number] = torch.stack([row.to(table.dtype) for row in rows]).mean(0)

    def renumbered(self, name: str) -> dict[int, int]:
        """Ids of the union by those of an expert's tokenizer, of the tokens that it has added.

        Args:
            name: of the expert.
        """
        return {number: self.ids[token] for token, number in self.own.get(name, {}).items()}

    def identity(self) -> Sequence[Any]:
        """What tells this vocabulary from another one."""
        return sorted(self.ids.items(), key=lambda entry: entry[1])

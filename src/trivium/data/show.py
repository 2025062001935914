"""Rows as the model will see them: every token, which are trained, which are control tokens, what is shared.

    shown = branches(example, encoder)      # what its sequences share, then each of them
    print(as_text(shown, example.origin, colour=True)); as_html([(example.origin, shown)], "rows")

What sequences share is shown once; where they part, each goes on in a branch of its own.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trivium.data.encoder import Encoder
from trivium.forest import Example, TokenSequence, common_prefix

TRAINED, CONTROL, BRANCH, PLAIN, OFF = "\033[30;42m", "\033[35m", "\033[36m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class Token:
    """One token's text, and how it is to be shown."""

    text: str
    id: int
    trained: bool
    control: bool


@dataclass(frozen=True)
class Branch:
    """Tokens that follow one another; ``name`` is empty for what all sequences share."""

    name: str
    tokens: tuple[Token, ...]


def branches(example: Example, encoder: Encoder) -> list[Branch]:
    """The example's sequences: what they have in common once, then each from where it parts on."""
    sequences = example.sequences
    shared = min((common_prefix(sequences[0].tokens, s.tokens) for s in sequences[1:]), default=0)
    # a token that one sequence trains and another does not is shown with the sequences
    while shared and any((s.weights[:shared] != sequences[0].weights[:shared]).any() for s in sequences[1:]):
        shared -= 1
    shown = [list(_tokens(s, encoder)) for s in sequences]
    if len(sequences) == 1 and not example.scores:
        return [Branch("", tuple(shown[0]))]
    if len(sequences) == 1:
        shared = int(np.flatnonzero(sequences[0].weights)[0])
    names = _named(example)
    found = [Branch(name, tuple(tokens[shared:])) for name, tokens in zip(names, shown, strict=True)]
    return [Branch("", tuple(shown[0][:shared])), *found] if shared else found


def _named(example: Example) -> list[str]:
    """What its sequences are called."""
    scores = example.scores
    if not scores:
        return [f"turn {n}" for n in range(1, len(example.sequences) + 1)]
    if len(scores) == 1:
        return ["good" if scores[0] > 0 else "bad"]
    return ["chosen", "rejected"] if len(scores) == 2 else [f"score {score:g}" for score in scores]


def _tokens(sequence: TokenSequence, encoder: Encoder) -> Iterator[Token]:
    """Each token's own characters; those of a character that several tokens make stand at the last of them."""
    ids = sequence.tokens.tolist()
    said, start = "", 0
    for n, token in enumerate(ids):
        control = token in encoder.added
        if control:
            text, said, start = encoder.added[token].content, "", n + 1
        else:
            whole = encoder.backend.decode(ids[start : n + 1], skip_special_tokens=False)
            cut = whole.endswith("\ufffd") and n + 1 < len(ids) and ids[n + 1] not in encoder.added
            text = "" if cut else whole[len(said) :]
            said = said if cut else whole
            if len(said) > 200:  # begin anew, before it takes long
                said, start = encoder.backend.decode(ids[n : n + 1], skip_special_tokens=False), n
        yield Token(text, token, bool(sequence.weights[n]), control)


def as_text(shown: Sequence[Branch], title: str, colour: bool) -> str:
    """For a terminal; without colours, ⟦ and ⟧ stand around what is trained."""
    lines = [f"{BRANCH}{title}{OFF}" if colour else title]
    for branch in shown:
        if branch.name:
            lines.append(f"{BRANCH}├─ {branch.name}{OFF}" if colour else f"├─ {branch.name}")
        text = "".join(_runs(branch.tokens, colour))
        indent = "│  " if branch.name else ""
        lines += [indent + line for line in text.split("\n")]
    return "\n".join(lines)


def _runs(tokens: Iterable[Token], colour: bool) -> Iterator[str]:
    open_run = False
    for token in tokens:
        text = token.text
        if colour:
            look = (TRAINED if token.trained else "") + (CONTROL if token.control and not token.trained else "")
            # a colour does not go on over the line's end
            text = text.replace("\n", f"↵{OFF}\n{look}") if token.trained else text
            yield f"{look or PLAIN}{text}{OFF}"
            continue
        if token.trained != open_run:
            yield "⟦" if token.trained else "⟧"
            open_run = token.trained
        yield text
    if open_run:
        yield "⟧"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --trained: light-dark(#bfe8c4, #1f5b2c); --control: light-dark(#8a3ea8, #d59bf0);
  --edge: light-dark(#ccc, #444); }}
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; margin: 0; }}
.row {{ border-top: 1px solid var(--edge); padding: 1rem 0; }}
.branch {{ border-left: 3px solid var(--edge); margin: .5rem 0 .5rem 1rem; padding-left: .8rem; }}
.t {{ background: var(--trained); }} .c {{ color: var(--control); font-weight: 600; }}
span[title]:hover {{ outline: 1px solid; }} h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1rem; }} small {{ opacity: .7; }}
</style></head><body><h1>{title}</h1>
<p><span class="t">trained tokens</span>, <span class="c">control tokens</span>, and everything else that is read.
A token's number shows under the pointer. What several sequences share stands once, before their branches.</p>
{rows}</body></html>
"""


def as_html(rows: Sequence[tuple[str, Sequence[Branch]]], title: str) -> str:
    """One page without scripts or outside references."""
    shown = [f'<div class="row"><h2>{html.escape(name)}</h2>{"".join(map(_branch, some))}</div>' for name, some in rows]
    return PAGE.format(title=html.escape(title), rows="\n".join(shown))


def _branch(branch: Branch) -> str:
    spans = []
    for token in branch.tokens:
        look = " ".join(["t"] * token.trained + ["c"] * token.control)
        text = html.escape(token.text).replace("\n", "↵\n")
        spans.append(f'<span title="{token.id}"{f" class={look!r}" if look else ""}>{text}</span>')
    body = f"<pre>{''.join(spans)}</pre>"
    return f'<div class="branch"><small>{branch.name}</small>{body}</div>' if branch.name else body

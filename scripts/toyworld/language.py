"""The words of the toy world in one place: captions, referring expressions, implicit queries and dialogues."""

from toyworld.expressions import POSITIONAL, Expression, expressions
from toyworld.knowledge import Implicit, implicit
from toyworld.talk import captions, dialogues

__all__ = ["POSITIONAL", "Expression", "Implicit", "captions", "dialogues", "expressions", "implicit"]
